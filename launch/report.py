"""python launch/report.py RUN [RUN...]

Writes a report of a run, or of several side by side: one HTML file that needs nothing else.
"""

import argparse
import sys
from pathlib import Path

# Started as a script, launch/ is first on the path, where its modules would shadow others of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.common.errors import UserError
from launch.common.paths import REPORT
from launch.process.environment import keep_quiet


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="report.py", description="Write a report of a run, or of several.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="The directory of a run.")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"The file to write (default: {REPORT} in the run's directory; of several runs, in this one).",
    )
    options = parser.parse_args(argv)
    keep_quiet()
    from launch.reporting.write import write_report  # slow to import

    output = options.output or (options.runs[0] / REPORT if len(options.runs) == 1 else Path(REPORT))
    write_report(options.runs, output)
    print(f"report: {output}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
