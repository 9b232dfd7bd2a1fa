"""The stages of the GPU examination (``benchmarks/gpu.py``).

Each module has ``run(stage)``, which adds cases to its stage, and ``rows(result)``, which makes the table of a result file,
finished or not.
"""

STAGES = {  # in the order in which they run, the most valuable first: seconds at most, and the question
    "smoke": (60, "Does a run on this GPU train, save, resume and convert?"),
    "tests": (150, "Do the tests marked gpu pass?"),
    "step": (240, "How fast is a training step, with how much memory, and against transformers' ViTMAE?"),
    "feed": (120, "How many images a second does each decoder deliver, and what does training lose to data?"),
    "host": (60, "How long does the host take between kernels, and does a step wait for the GPU?"),
    "profile": (60, "Which kernels take the time of a compiled ViT-L step?"),
}
