"""The command line: parses, calls, prints."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hematovision.config import BACKBONE_NAMES
from hematovision.errors import ConfigError, HematoVisionError
from hematovision.files import explain_os_error

_DATA_HELP = "folder that holds blood-cells/ and pbc/ (default: HEMATOVISION_DATA, else data/raw)"
_PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class Command:
    """One subcommand: its name, what it does in a line, its arguments, and what carries it out.

    ``run`` imports what it needs itself, so that the command line starts fast, and returns the exit
    status.
    """

    name: str
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _counter() -> Callable[[int, int], None]:
    """Return a function that tells (done, total) files on the error stream, now and then."""
    last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 2.0:
            last = time.monotonic()
            _say(f"  {done:,} of {total:,} files")

    return tell


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="DIR", type=Path, help=_DATA_HELP)


# -- fetch ---------------------------------------------------------------------------------------


def _fetch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=("blood-cells", "pbc"), help="the set to download")
    _add_data(parser)
    parser.add_argument(
        "--force", action="store_true", help="replace what is there, once the new is complete"
    )


def _fetch(options: argparse.Namespace) -> int:
    from hematovision.data.fetch import fetch

    print(fetch(options.name, options.data, force=options.force, say=_say, progress=_counter()))
    return 0


# -- manifest ------------------------------------------------------------------------------------


def _manifest_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="a data set: synthetic, blood-cells, pbc or folder")
    _add_data(parser)
    parser.add_argument("--out", metavar="FILE.csv", type=Path, required=True, help="where to write it")


def _manifest(options: argparse.Namespace) -> int:
    from hematovision.data.catalog import write_set_manifest

    _say(f"reading every image of {options.name}")
    done = write_set_manifest(options.name, options.out, options.data, _counter())
    for note in done.notes:
        _say(note)
    print(f"{options.out}: {len(done.manifest):,} images")
    return 0


# -- report --------------------------------------------------------------------------------------


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", default="quick", help="name of a file in profiles/ (default: quick)")
    _add_data(parser)
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="replace a value of the profile; KEY.BACKBONE=VALUE replaces one backbone's; may be repeated",
    )
    parser.add_argument("--jobs", type=_positive, default=1, metavar="N", help="notebooks run side by side")
    parser.add_argument("--force", action="store_true", help="run everything again")


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number, 1 or more")
    return int(text)


def _overrides(pairs: Sequence[str]) -> dict[str, str]:
    overrides = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"'--set {pair}' has no value", "write --set key=value")
        overrides[key.strip()] = value.strip()
    return overrides


def _report(options: argparse.Namespace) -> int:
    from hematovision.report.run import run_report

    index = run_report(
        options.profile,
        data=options.data,
        overrides=_overrides(options.set),
        jobs=options.jobs,
        force=options.force,
    )
    print(f"report: {index}")
    return 0


# -- pretrain ------------------------------------------------------------------------------------


def _pretrain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", required=True, choices=BACKBONE_NAMES, help="the network to train")
    _add_data(parser)
    parser.add_argument(
        "--weights",
        metavar="SOURCE",
        help="imagenet, none, or a file (default: imagenet for mobilenetv2, none for the others)",
    )
    parser.add_argument(
        "--epochs", type=_positive, metavar="N", help="of every stage, in place of the plan's own numbers"
    )
    parser.add_argument(
        "--out", metavar="FILE.npz", type=Path, help="default: models/released/pretrained/NAME.npz"
    )


def _pretrain(options: argparse.Namespace) -> int:
    from hematovision.data.sides import read_pbc_sides
    from hematovision.learn.pretraining import plan_for, pretrain

    if options.out and options.out.suffix != ".npz":
        raise ConfigError(f"compact weights are not written as {options.out.name}", "use .npz")
    plan = plan_for(options.backbone, options.weights, options.epochs)
    _say("reading and cutting the cells of pbc")
    cells = read_pbc_sides(options.data, progress=_counter())
    with contextlib.redirect_stdout(sys.stderr):  # the lines of the epochs are progress
        file = pretrain(options.backbone, cells, plan=plan, out=options.out, say=_say)
    print(file)
    return 0


# -- predict -------------------------------------------------------------------------------------


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="DIR",
        type=Path,
        help="folder of a trained model (default: models/released, else full/final or quick/final there)",
    )


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", metavar="PATH", type=Path, nargs="+", help="image, or folder of images")
    _add_model(parser)
    parser.add_argument(
        "--precision",
        choices=("float32", "int8"),
        default="float32",
        help="which of the folder's models: int8 is smaller and faster (default: float32)",
    )
    parser.add_argument(
        "--cells",
        choices=("find", "whole"),
        default="find",
        help="find white cells in a field, or take each picture for one cell (default: find)",
    )
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="table to write, .csv or .jsonl (default: CSV on the screen)"
    )


def _predict(options: argparse.Namespace) -> int:
    from hematovision.release.predict import CellPrediction, Classifier, predict_files, write_table

    classifier = Classifier.load(options.model, options.precision)
    _say(f"model: {classifier.bundle.title}; for research and teaching, not for clinical use")
    tally: Counter[str] = Counter()
    last = time.monotonic()

    def counted() -> Iterator[CellPrediction]:
        nonlocal last
        for prediction in predict_files(classifier, options.paths, options.cells):
            tally["unreadable" if prediction.unreadable else prediction.decision] += 1
            if time.monotonic() - last > _PROGRESS_SECONDS:
                last = time.monotonic()
                _say(f"{tally.total()} cells so far, now {prediction.image}")
            yield prediction

    write_table(counted(), classifier.classes, options.out)
    told = {"accept": "accepted", "review": "to review", "reject": "rejected", "unreadable": "unreadable"}
    _say(", ".join(f"{tally[key]} {word}" for key, word in told.items()))
    return 1 if tally["unreadable"] else 0


# -- demo ----------------------------------------------------------------------------------------


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--share", action="store_true", help="open a public link to it (through gradio)")
    parser.add_argument("--port", type=_positive, default=7860, help="port of the web page (default: 7860)")
    _add_model(parser)


def _demo(options: argparse.Namespace) -> int:
    import runpy

    from hematovision.config import project_root

    path = project_root() / "app_gradio.py"
    if not path.is_file():
        raise HematoVisionError(f"there is no {path}", "run from a checkout of the project")
    runpy.run_path(str(path))["launch"](share=options.share, port=options.port, model=options.model)
    return 0


COMMANDS: tuple[Command, ...] = (
    Command("fetch", "download a public image set", _fetch_arguments, _fetch),
    Command("manifest", "write the table of a set's images", _manifest_arguments, _manifest),
    Command("report", "run the study: notebooks, models, report", _report_arguments, _report),
    Command("pretrain", "train a backbone on the eight classes of pbc", _pretrain_arguments, _pretrain),
    Command("predict", "name the white cells of images", _predict_arguments, _predict),
    Command("demo", "start the web demo of the final model", _demo_arguments, _demo),
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="hematovision",
        description="White blood cells by transfer learning, for research and teaching, "
        "not for clinical use.",
    )
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error (or set HEMATOVISION_DEBUG)"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.help, description=command.help.capitalize())
        command.arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, 1, 2 for an error, 130 if stopped.

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the process if not given.

    Returns
    -------
    int
    """
    options = build_parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        _say("hematovision: stopped; what was done is kept, the same command goes on from here")
        return 130
    except BrokenPipeError:
        # whoever read our output has closed it; leave Python nothing to flush into it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if options.debug or os.environ.get("HEMATOVISION_DEBUG"):
            traceback.print_exc()
        _say(f"hematovision: {_one_line(error)}")
        return 2


def _one_line(error: Exception) -> str:
    if isinstance(error, HematoVisionError):
        return getattr(error, "block", str(error))
    if isinstance(error, OSError) and error.filename:
        return str(explain_os_error(error, error.filename))
    if isinstance(error, OSError):
        return f"{error.strerror or error}".lower()
    message = " ".join(str(error).split())
    return f"unexpected {type(error).__name__}: {message} (see it all with HEMATOVISION_DEBUG=1)"


if __name__ == "__main__":
    sys.exit(main())
