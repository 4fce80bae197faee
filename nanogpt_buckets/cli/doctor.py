"""`nanogpt-buckets doctor`. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict

import click

from nanogpt_buckets.cli import output
from nanogpt_buckets.cli.options import output_options
from nanogpt_buckets.doctor import examine
from nanogpt_buckets.findings import Verdict


@click.command()
@click.argument("place", required=False, metavar="[PATH|URL]")
@output_options
def doctor(place: str | None, as_json: bool) -> int:
    """Say what works on this machine and what is wrong, and how to mend it. Exit 1 if something is wrong.

    PATH is a cache directory, or a tar file of entries, to look at instead of the default directory; URL is
    s3://BUCKET/PREFIX, gs://... or az://.... What is named is tried, too: a little is written there and removed again,
    to see how entries are published, whether locks hold, and what time it is there. Without, nothing is changed.

    Example: nanogpt-buckets doctor /mnt/shared/buckets
    """
    findings = examine(place)
    counts = {verdict: sum(f.verdict is verdict for f in findings) for verdict in Verdict}
    if as_json:
        facts = [asdict(finding) for finding in findings]
        output.document({"problems": counts[Verdict.PROBLEM], "warnings": counts[Verdict.WARNING], "findings": facts})
    else:
        output.table(("TOPIC", "WHAT", "STATE", "FOUND"), [(f.topic, f.name, f.verdict, f.value) for f in findings])
    for finding in findings:
        if finding.verdict is not Verdict.OK:
            output.complain(f"{finding.verdict}: {finding.topic}, {finding.name}: {finding.value}")
            if finding.hint:
                output.complain(f"hint: {finding.hint}")
    problems = output.count(counts[Verdict.PROBLEM], "problem", "problems")
    output.say(f"{problems}, {output.count(counts[Verdict.WARNING], 'warning', 'warnings')}")
    return 1 if counts[Verdict.PROBLEM] else 0
