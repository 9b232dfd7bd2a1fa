"""A real Prometheus for tests. It uses the shipped files with one second in place of each minute."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import yaml
from ranks import free_port

MONITORING = Path(__file__).parent.parent / "cluster" / "monitoring"
MINUTES = {"m": 1, "h": 60, "d": 1440}


def fast(rules):
    """Replace minutes by seconds: in durations (``for: 5m``, ``[1h]``) and in products (``10 * 60``)."""
    rules = re.sub(r"\b(\d+)([mhd])\b", lambda found: f"{int(found[1]) * MINUTES[found[2]]}s", rules)
    return re.sub(r"\* 60\b", "* 1", rules)


def fetch(address, data=None):
    """Return the response of a server, without a proxy."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, data=data, timeout=20) as answer:
        return answer.read()


class PrometheusServer:
    """A Prometheus in ``folder``. It reads targets from ``discovery``, and scrapes and evaluates rules every 0.25 s."""

    def __init__(self, folder, discovery):
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "250ms", "scrape_timeout": "250ms", "evaluation_interval": "250ms"}
        (scrape,) = config["scrape_configs"]
        (found,) = scrape["file_sd_configs"]
        found |= {"files": [f"{discovery}/*.json"], "refresh_interval": "1s"}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        for name in config["rule_files"]:
            (folder / name).write_text(fast((MONITORING / name).read_text()))
        self.address = f"127.0.0.1:{free_port()}"
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        command += [f"--web.listen-address={self.address}", "--query.lookback-delta=5s", "--log.level=warn"]
        with open(folder / "prometheus.log", "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.wait(lambda: self._ready(folder / "prometheus.log"), 30)

    def _ready(self, log):
        assert self.process.poll() is None, log.read_text()
        try:
            return self._get("/-/ready") is not None
        except OSError:
            return False

    def stop(self):
        self.process.terminate()
        self.process.wait(20)

    def _get(self, path, **arguments):
        return fetch(f"http://{self.address}{path}", urllib.parse.urlencode(arguments).encode() or None)

    def scrape(self):
        """Return the current response of the only target."""
        (target,) = self.targets()
        return fetch(f"http://{target['address']}/metrics").decode()

    def query(self, expression, at=None):
        """Return the samples of an instant query. Raises if the query is invalid."""
        arguments = {} if at is None else {"time": at}
        return json.loads(self._get("/api/v1/query", query=expression, **arguments))["data"]["result"]

    def value(self, expression, at=None):
        """Return the value of the only sample; ``None`` without a sample."""
        result = self.query(expression, at)
        assert len(result) <= 1, result
        return float(result[0]["value"][1]) if result else None

    def samples(self, series, seconds=300):
        """Return the scraped samples of one series: time -> value."""
        result = self.query(f"{series}[{seconds}s]")
        assert len(result) == 1, [found["metric"] for found in result]
        return {time: float(value) for time, value in result[0]["values"]}

    def range(self, expression, since, until, step=0.25):
        """Return the values of a range query over all its series."""
        found = json.loads(self._get("/api/v1/query_range", query=expression, start=since, end=until, step=step))
        return [float(value) for series in found["data"]["result"] for _, value in series["values"]]

    def names(self):
        """Return the names of all series."""
        return set(json.loads(self._get("/api/v1/label/__name__/values"))["data"])

    def targets(self):
        """Return the labels and the address of each target."""
        found = json.loads(self._get("/api/v1/targets?state=active"))["data"]["activeTargets"]
        return [target["labels"] | {"address": target["discoveredLabels"]["__address__"]} for target in found]

    def firing(self):
        """Return the names of the firing alerts."""
        return {found["metric"]["alertname"] for found in self.query('ALERTS{alertstate="firing"}')}

    @staticmethod
    def wait(condition, seconds):
        """Wait until ``condition()`` is true, and return its value."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, f"condition not met within {seconds} s"
            time.sleep(0.1)
        return value


def promtool(*arguments):
    """Run promtool and return its output. Fails if promtool fails."""
    done = subprocess.run(["promtool", *arguments], cwd=MONITORING, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
