"""Images for the demo (Fashion-MNIST), and the script that packs them."""
