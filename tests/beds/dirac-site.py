"""A grid site for tests: takes the jobs that wait in a DiracX server and really runs them.

    dirac-site.py BED [--slots N] [--beat SECONDS] [--name NAME]

DiracX takes jobs and keeps their statuses; in a real installation other services of DIRAC, on the same
database, look after the queue and hand jobs to workers. This program stands where they stand. It reads
a job's JDL from the database, as they do, and does all else over HTTP, with the statuses and in the order
of DIRAC's own job wrapper. A payload gets what it would get there: its input sandbox unpacked in its
working directory, JOBID, a proxy file with a token of its owner, TERM and then KILL when it was killed.

DIRAC's heartbeats come every 20 minutes; here they come every 10 seconds, so that a payload that looks
after itself is still the first to notice that it was killed.

While a file `hold` lies in BED, nothing is started.

Workers differ. What lies as JSON in BED/workers/JOBNAME makes one job's worker odd, as real ones are:
"shell" runs its program, "folder" is its directory's name, "env" changes its environment (null takes a
variable away), "token_seconds" is how long its token lives, "refresh": false leaves it without a refresh
token, "renew_every" has the pilot renew its proxy file, "deaf": true spares it the site's heartbeats.
"""
import argparse
import base64
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zlib
from datetime import datetime, timezone
from pathlib import Path

import zstandard

URL = os.environ["DIRACX_URL"]
# From TERM to KILL.
MERCY = 5


def call(token, method, path, body=None):
    request = urllib.request.Request(URL + path, method=method, headers={"Authorization": "Bearer " + token})
    if body is not None:
        request.add_header("Content-Type", "application/json")
        request.data = json.dumps(body).encode()
    with urllib.request.urlopen(request, timeout=60) as reply:
        text = reply.read()
    return json.loads(text) if text else None


def patiently(what):
    """A worker outlives its server's restart."""
    for attempt in range(60):
        try:
            return what()
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == 59:
                raise
        except OSError:
            if attempt == 59:
                raise
        time.sleep(0.5)


def strings(value):
    return [value] if isinstance(value, str) else value or []


class Job(threading.Thread):
    def __init__(self, site, row):
        super().__init__(name=f"job-{row['JobID']}", daemon=True)
        self.site, self.row, self.id = site, row, row["JobID"]
        self.killed, self.odd = False, {}
        self.beaten = time.monotonic()

    def report(self, status=None, minor=None, application=None, source="JobWrapper"):
        said = {"Status": status, "MinorStatus": minor, "ApplicationStatus": application}
        update = {"Source": source, **{k: v for k, v in said.items() if v}}
        now = datetime.now(timezone.utc).isoformat()
        done = patiently(lambda: call(self.site.pilot, "PATCH", "/api/jobs/status", {str(self.id): {now: update}}))
        return done["success"][str(self.id)]["Status"]

    def run(self):
        try:
            self.work()
        except Exception as error:  # the job must not stay Running because the site stumbled
            traceback.print_exc()
            try:
                self.report("Failed", "Exception During Execution", repr(error)[:200])
            except Exception:
                traceback.print_exc()

    def jdl(self):
        with sqlite3.connect(f"file:{self.site.bed}/state/JobDB.sqlite?mode=ro", uri=True, timeout=60) as db:
            packed, = db.execute("select JDL from JobJDLs where JobID = ?", (self.id,)).fetchone()
        text = packed if packed.startswith("[") else zlib.decompress(base64.b64decode(packed)).decode()
        text = re.sub(r"JobRequirements\s*=\s*\[.*?\];", "", text, flags=re.S)
        found = {}
        for name, value in re.findall(r"^\s*([\w.]+) =\s*(\{.*?\}|[^;]*);", text, flags=re.S | re.M):
            quoted = re.findall(r'"(.*?)"', value)
            found[name] = quoted if value.startswith("{") else (quoted[0] if quoted else value.strip())
        return found

    def owner(self):
        query = urllib.parse.urlencode({
            "preferred_username": self.row["Owner"], "expires_minutes": 1440,
            "scope": f"vo:{self.row['VO']} group:{self.row['OwnerGroup']}"})
        return patiently(lambda: call(self.site.api_key, "GET", "/api/auth/legacy-exchange?" + query))

    def access(self, tokens):
        """A token of the job's owner; a short one for an odd worker."""
        if "token_seconds" not in self.odd:
            return tokens["access_token"]
        mint = [sys.executable, Path(__file__).with_name("dirac-server.py"), "mint", self.site.bed / "state", URL,
                self.row["Owner"], str(self.odd["token_seconds"] / 60)]
        return subprocess.run(mint, check=True, capture_output=True, text=True).stdout.strip()

    def write_proxy(self, proxy, tokens):
        kept = {"access_token": self.access(tokens), "expires_on": int(time.time()) + tokens["expires_in"] - 15}
        if self.odd.get("refresh", True):
            kept["refresh_token"] = tokens["refresh_token"]
        coded = base64.encodebytes(json.dumps(kept).encode()).decode()
        aside = proxy.with_suffix(".new")
        aside.touch(0o600)
        aside.write_text(f"-----BEGIN DIRACX-----\n{coded}-----END DIRACX-----\n")
        aside.rename(proxy)
        self.renewed = time.monotonic()

    def work(self):
        odd = self.site.bed / "workers" / (self.row.get("JobName") or "none")
        self.odd = json.loads(odd.read_text()) if odd.is_file() else {}
        # DIRAC's wrapper does not look at the answer either: who was killed just now begins all the same.
        self.report("Running", "Job Initialization")
        spec, tokens = self.jdl(), self.owner()
        # A job that is started again may still run elsewhere.
        folder = self.site.bed / "jobs" / f"{self.id}-{uuid.uuid4().hex[:8]}"
        work = folder / self.odd.get("folder", "work")
        work.mkdir(parents=True)
        try:
            self.payload(spec, tokens, folder, work)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def payload(self, spec, tokens, folder, work):
        self.report(minor="Downloading InputSandbox")
        for pfn in strings(spec.get("InputSandbox")):
            self.unpack(tokens["access_token"], pfn, work)
        proxy = folder / "proxy.pem"
        self.write_proxy(proxy, tokens)
        program = work / spec.get("Executable", "")
        if not program.is_file():
            self.report("Failed", "Application not found")
            return
        program.chmod(program.stat().st_mode | 0o555)
        code = self.execute(program, spec, work, proxy, tokens)
        if self.killed:
            self.report("Failed", "Received Kill signal")
            return
        good = code == 0
        self.report("Completing", "Application Finished Successfully" if good else "Application Finished With Errors")
        self.report("Completing", "Uploading Output Sandbox")
        if self.output(tokens["access_token"], spec, work):
            self.report("Completing", "Output Sandbox Uploaded")
        if good:
            self.report("Done", "Execution Complete")
        else:
            self.report("Failed", "Application Finished With Errors", f"Exited with status {code}")

    @staticmethod
    def unpack(token, pfn, work):
        query = urllib.parse.urlencode({"pfn": pfn})
        where = patiently(lambda: call(token, "GET", "/api/jobs/sandbox?" + query))
        with urllib.request.urlopen(where["url"], timeout=60) as reply:
            packed = reply.read()
        if packed[:4] == b"\x28\xb5\x2f\xfd":
            packed = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed)).read()
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            tar.extractall(work, filter="data")

    def execute(self, program, spec, work, proxy, tokens):
        """As with DIRAC, program and arguments are one line that a shell reads."""
        self.report(minor="Application")
        environment = dict(os.environ, JOBID=str(self.id), DIRACSITE=self.site.name,
                           X509_USER_PROXY=str(proxy), BED_JOB=str(work))
        for name, value in self.odd.get("env", {}).items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value
        line = f"{self.odd.get('shell', '')} {shlex.quote(str(program))} {spec.get('Arguments', '')}".strip()
        out, err = work / spec.get("StdOutput", "std.out"), work / spec.get("StdError", "std.err")
        with open(out, "wb") as out_file, open(err, "wb") as err_file:
            process = subprocess.Popen(
                line, shell=True, cwd=work, env=environment,
                stdin=subprocess.DEVNULL, stdout=out_file, stderr=err_file, start_new_session=True)
            while process.poll() is None:
                if not self.odd.get("deaf"):
                    self.beat(out)
                if time.monotonic() - self.renewed > self.odd.get("renew_every", 86400):
                    self.write_proxy(proxy, tokens)
                if self.killed:
                    os.killpg(process.pid, signal.SIGTERM)
                    try:
                        process.wait(MERCY)
                    except subprocess.TimeoutExpired:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
                else:
                    try:
                        process.wait(0.2)
                    except subprocess.TimeoutExpired:
                        pass
        return process.returncode

    def beat(self, out):
        """Two beats of one job within a second make the server fail."""
        if time.monotonic() - self.beaten < max(self.site.beat, 1.1):
            return
        self.beaten = time.monotonic()
        tail = out.read_bytes()[-4000:].decode(errors="replace")
        try:
            commands = call(self.site.pilot, "PATCH", "/api/jobs/heartbeat",
                            {str(self.id): {"LoadAverage": os.getloadavg()[0], "StandardOutput": tail}})
        except OSError as error:
            print(f"job {self.id}: heartbeat: {error}", flush=True)
            return
        self.killed = any(command["command"] == "Kill" for command in commands)

    def output(self, token, spec, work):
        files = [work / name for name in strings(spec.get("OutputSandbox")) if (work / name).exists()]
        if not files:
            return False
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:bz2") as tar:
            for path in files:
                tar.add(path, arcname=path.name)
        data = packed.getvalue()
        about = {"checksum_algorithm": "sha256", "checksum": hashlib.sha256(data).hexdigest(),
                 "size": len(data), "format": "tar.bz2"}
        told = patiently(lambda: call(token, "POST", "/api/jobs/sandbox", about))
        if told.get("url"):
            edge = uuid.uuid4().hex
            form = b"".join(
                f'--{edge}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
                for name, value in told["fields"].items())
            form += f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="file"\r\n\r\n'.encode()
            form += data + f"\r\n--{edge}--\r\n".encode()
            request = urllib.request.Request(told["url"], data=form, method="POST", headers={
                "Content-Type": f"multipart/form-data; boundary={edge}"})
            urllib.request.urlopen(request, timeout=60).close()
        try:
            patiently(lambda: call(self.site.pilot, "PATCH", f"/api/jobs/{self.id}/sandbox/output", told["pfn"]))
        except urllib.error.HTTPError as error:
            print(f"job {self.id}: output sandbox: {error}", flush=True)
        return True


class Site:
    def __init__(self, options):
        self.bed = Path(options.bed)
        self.admin = (self.bed / "state/admin.token").read_text()
        self.pilot = (self.bed / "state/pilot.token").read_text()
        self.api_key = (self.bed / "state/api.key").read_text()
        self.beat, self.slots, self.name = options.beat, options.slots, options.name
        self.jobs = []

    def turn(self):
        self.jobs = [job for job in self.jobs if job.is_alive()]
        rows = call(self.admin, "POST", "/api/jobs/search?per_page=500", {
            "parameters": ["JobID", "JobName", "Status", "Owner", "OwnerGroup", "VO", "Site", "UserPriority"],
            "search": [{"parameter": "Status", "operator": "in", "values": ["Received", "Checking", "Waiting"]}],
            "sort": [{"parameter": "UserPriority", "direction": "desc"}, {"parameter": "JobID", "direction": "asc"}]})
        for row in rows:
            if row["Site"] not in ("ANY", "Multiple", self.name):
                continue
            job = Job(self, row)
            # What DIRAC's optimisers do with a new job, and its matcher once a slot asks for work.
            if row["Status"] == "Received":
                if job.report("Checking", "JobScheduling", source="OptimizerMind") != "Checking":
                    continue
            if row["Status"] != "Waiting":
                if job.report("Waiting", "Pilot Agent Submission", source="OptimizerMind") != "Waiting":
                    continue
            if len(self.jobs) >= self.slots or (self.bed / "hold").exists():
                continue
            if job.report("Matched", "Assigned", source="Matcher") == "Matched":
                call(self.pilot, "PATCH", "/api/jobs/metadata", {str(row["JobID"]): {"Site": self.name}})
                job.start()
                self.jobs.append(job)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("bed")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--beat", type=float, default=10.0)
    parser.add_argument("--name", default="DIRAC.Bed.local")
    site = Site(parser.parse_args())
    while True:
        try:
            site.turn()
        except OSError as error:
            print(f"site: {error}", flush=True)
        time.sleep(0.2)


if __name__ == "__main__":
    main()
