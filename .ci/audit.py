"""Looks for known vulnerabilities of what locks hold, with pip-audit. What the database could not be asked about it says.

    python -P .ci/audit.py LOCK...

The exit code is 1 if there are any, and 0 if there are none or the database, which is on the network, cannot be reached.
"""

from __future__ import annotations

import json
import subprocess
import sys


def audit(lock: str) -> int:
    """Tell of one lock; how many vulnerabilities there are."""
    command = [sys.executable, "-P", "-m", "pip_audit", "--disable-pip", "--require-hashes", "--requirement", lock]
    done = subprocess.run(
        [*command, "--progress-spinner", "off", "--format", "json"], capture_output=True, text=True, check=False
    )
    try:
        found = json.loads(done.stdout)["dependencies"]
    except ValueError:
        sys.stdout.write(f"{lock}: NOT AUDITED: {done.stderr.strip().splitlines()[-1]}\n")
        return 0
    asked = [one for one in found if "skip_reason" not in one]
    skipped = [one["name"] for one in found if "skip_reason" in one]
    known = [(one["name"], one["version"], flaw) for one in asked for flaw in one["vulns"]]
    sys.stdout.write(f"{lock}: {'' if asked else 'NOT AUDITED: '}{len(asked)} of {len(found)} packages looked up")
    sys.stdout.write(f", {len(known)} known vulnerabilities\n" if asked else ", the database knows none of them\n")
    if asked and skipped:
        sys.stdout.write(f"  not looked up: {', '.join(skipped)}\n")
    for name, version, flaw in known:
        sys.stdout.write(
            f"  {name} {version}: {flaw['id']}, fixed in {', '.join(flaw['fix_versions']) or 'none yet'}\n"
        )
    return len(known)


if __name__ == "__main__":
    sys.exit(bool(sum([audit(lock) for lock in sys.argv[1:]])))
