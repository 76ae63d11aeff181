"""Make the HTML report of a run: python -m dppo_mcore.report RUN [--open | --watch]."""

from __future__ import annotations

import argparse
import sys
import webbrowser
from pathlib import Path

from dppo_mcore.report.blocks import Limits
from dppo_mcore.report.page import write
from dppo_mcore.report.read import ReportError, open_run
from dppo_mcore.report.watch import make_server


def parser() -> argparse.ArgumentParser:
    """Command line of the report."""
    bounds = Limits()
    made = argparse.ArgumentParser(prog="python -m dppo_mcore.report", description=__doc__)
    made.add_argument("run", type=Path, help="run folder")
    made.add_argument("--out", type=Path, help="file to write (default: RUN/report.html)")
    made.add_argument("--open", action="store_true", help="open it in the browser")
    made.add_argument("--watch", action="store_true", help="serve it on loopback and refresh while the run goes on")
    made.add_argument("--port", type=int, default=8642, help="port of --watch; 0 takes a free one")
    made.add_argument("--max-rollouts", type=int, default=bounds.rollouts, help="newest rollouts in the file")
    made.add_argument("--max-megabytes", type=float, default=bounds.megabytes, help="size of the whole file")
    made.add_argument("--frame-samples", type=int, default=bounds.frame_samples, help="samples with pictures")
    made.add_argument("--frame-seconds", type=float, default=bounds.frame_seconds, help="most time spent on pictures")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Write or serve the report; returns the exit status."""
    options = parser().parse_args(arguments)
    limits = Limits(options.max_rollouts, options.max_megabytes, options.frame_samples, options.frame_seconds)
    try:
        if not options.watch:
            path = write(options.run, options.out, limits)
            print(path)
            if options.open:
                webbrowser.open(path.resolve().as_uri())
            return 0
        open_run(options.run).close()
        server = make_server(options.run, options.port, limits)
    except (ReportError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    print(f"{address} shows {options.run} as it goes on; Ctrl-C ends", flush=True)
    if options.open:
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
