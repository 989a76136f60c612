"""The commands."""

from __future__ import annotations

import functools
import gc
import json
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import click
import structlog

from spoold import __version__, config, logs, terminal
from spoold.clock import SystemClock
from spoold.errors import ConfigError, LedgerUnavailable, SpooldError
from spoold.explain import Explainer, NoSpoolHasIt, find
from spoold.ledger import Ledger
from spoold.owner import OWNERS, living
from spoold.printable import printable

EX_OK, EX_USAGE, EX_DATAERR, EX_UNAVAILABLE, EX_SOFTWARE, EX_TEMPFAIL, EX_CONFIG = 0, 64, 65, 69, 70, 75, 78
DEFAULT_CONFIG = "/etc/spoold/config.yaml"
_DEPENDENCIES = ("boto3", "watchdog", "SQLAlchemy", "Pillow", "structlog", "tenacity", "pydantic")


class _Seconds(click.ParamType[float]):
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
        text = str(value)
        for unit, factor in units.items():
            number = text.removesuffix(unit)
            if number != text and number.replace(".", "", 1).isdigit():
                return float(number) * factor
        self.fail(f"{value!r} is no duration: write a number and ms, s, m, h or d, such as 30s", param, ctx)


def _configured(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command its configuration, named before it or behind it."""

    @click.option("-c", "--config", "own_file", metavar="FILE", help="The configuration; may stand before the command too.")
    @click.pass_obj
    @functools.wraps(command)
    def with_file(file: str, /, *_: Any, **arguments: Any) -> int:
        return command(arguments.pop("own_file") or file, **arguments)

    return with_file


class _InOrder(click.Group):
    """Lists its commands as they come here: in the order in which one meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "-c", "--config", "file", default=DEFAULT_CONFIG, envvar="SPOOLD_CONFIG", show_default=True, metavar="FILE",
    help="The configuration. SPOOLD_CONFIG names it too.",
)  # fmt: skip
@click.pass_context
def cli(context: click.Context, file: str) -> None:
    """Take the slow part of file uploads away from web apps.

    The app writes a record's files into a spool directory and answers its user at once; spoold notices when the record is
    complete, uploads every file to S3, proves that each one arrived, and only then deletes the local files.

    \b
    See it work, with nothing set up:      spoold demo
    Before the first start:                spoold check
    Start it (systemd does the same):      spoold run
    Is anything stuck?                     spoold status
    Why is this file still here?           spoold why /srv/app/spool/avatars/42

    RECORD is a record's directory below the spool's root, such as avatars/42.
    """
    context.obj = file
    logs.configure(format="console", level="error", stream=sys.stderr)  # only `run` is there to tell what it does


@cli.command()
@click.option("--once", is_flag=True, help="Take everything complete as far as it will go, then end; do not wait for more.")
@click.option("--dry-run", is_flag=True, help="With --once: print what would go where and what would stay, and touch nothing.")
@_configured
def run(file: str, once: bool, dry_run: bool) -> int:
    """Run the daemon in the foreground, logging to standard output.

    SIGTERM drains: what is in flight ends, nothing new starts. A second SIGTERM exits at once. SIGHUP reads the
    configuration again; a bad one keeps the old settings and says so. Nothing is lost either way.

    \b
    Exit codes: 0   drained; with --once: nothing is left to do
                69  with --once: the destination refuses
                75  the drain timed out; with --once: something is left
                78  the configuration has mistakes
    """
    settings = _load(file)
    if dry_run:
        if not once:
            raise click.UsageError("--dry-run goes with --once: spoold run --once --dry-run")
        return _dry_run(settings)
    return _run(file, settings, once)


@cli.command()
@_configured
def check(file: str) -> int:
    """Find every mistake of the configuration; touch nothing.

    One line a mistake: FILE:LINE:COLUMN: setting: what is wrong; what to write instead. Exit code 78 if there is one.
    """
    settings = _load(file)
    for warning in settings.warnings:
        click.echo(f"warning: {warning}", err=True)
    for spool in settings.spools:
        if not os.path.isdir(spool.root):
            click.echo(f"warning: {file}: spool {spool.name}: there is no directory {spool.root} on this machine", err=True)
    names = ", ".join(f"{spool.name} ({spool.root} -> s3://{spool.bucket})" for spool in settings.spools)
    click.echo(f"{file}: no mistakes; spools: {names}")
    return EX_OK


@cli.command()
@click.argument("record", required=False)
@click.option("--spool", metavar="NAME", help="Where two spools have the record.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--watch", is_flag=True, help="Stay, and show every change; Ctrl-C ends it.")
@_configured
def status(file: str, record: str | None, spool: str | None, as_json: bool, watch: bool) -> int:
    """Show how many records are in which state, or one RECORD in full.

    \b
    receiving  not complete yet
    stalled    incomplete for long: waits for the app
    queued     complete, waits for its turn
    uploading  on its way
    retrying   an attempt did not succeed; heals by itself
    dead       given up; needs a person
    uploaded   proven in the bucket
    done       and the local files are gone, or stay by choice
    gone       the app removed it before it was uploaded
    """
    settings = _load(file)
    ledger = _ledger(settings)
    if record is not None:
        return _status_of(settings, ledger, record, spool, as_json)
    if watch:
        terminal.watch(lambda: terminal.overview(settings, ledger))
        return EX_OK
    overview = terminal.overview(settings, ledger)
    if as_json:
        click.echo(json.dumps(overview, indent=2))
    else:
        terminal.show(terminal.table(overview))
    return EX_OK


@cli.command()
@click.argument("path")
@click.option("--spool", metavar="NAME", help="Where two spools have the path.")
@_configured
def why(file: str, path: str, spool: str | None) -> int:
    """Say why PATH is still here, or where it went.

    One sentence, with what would change it. PATH is a file or a record, absolute or below a spool's root.
    """
    settings = _load(file)
    try:
        explainer, relative = find(_explainers(settings, _ledger_or_none(settings), spool), path)
        answer = explainer.why(relative)
    except NoSpoolHasIt as error:
        answer = f"{error}, so it is none of spoold's business; {error.hint}."
    click.echo(printable(answer))
    return EX_OK


@cli.command()
@click.argument("record")
@click.option("--timeout", "timeout_s", type=_Seconds(), default="30s", show_default=True, help="Give up after this long.")
@click.option("--spool", metavar="NAME", help="Where two spools have the record.")
@_configured
def wait(file: str, record: str, timeout_s: float, spool: str | None) -> int:
    """Wait until all of RECORD is proven in the bucket.

    That is: every file of its newest version. Looks at the disk first, so it may be called right after writing.

    \b
    Exit codes: 0   proven
                69  dead, or gone: nobody will upload it
                75  not within the timeout
    """
    settings = _load(file)
    explainer, relative = find(_explainers(settings, _ledger_or_none(settings), spool), record)
    deadline = time.monotonic() + timeout_s
    while True:
        standing = explainer.standing(relative)
        if standing == "proven":
            return EX_OK
        if standing in ("dead", "gone"):
            click.echo(printable(explainer.why(relative)), err=True)
            return EX_UNAVAILABLE
        if time.monotonic() >= deadline:
            click.echo(printable(f"{relative} is not proven after {timeout_s:g} s: {standing}"), err=True)
            return EX_TEMPFAIL
        time.sleep(0.1)
        if explainer.has_no_ledger:
            explainer, relative = find(_explainers(settings, _ledger_or_none(settings), spool), record)


@cli.command()
@click.argument("records", nargs=-1, metavar="[RECORD]...")
@click.option("--all", "everything", is_flag=True, help="All dead, retrying and incomplete records.")
@click.option("--as-is", is_flag=True, help="Take incomplete records as they lie.")
@click.option("--spool", metavar="NAME", help="Only of this spool.")
@_configured
def retry(file: str, records: tuple[str, ...], everything: bool, as_is: bool, spool: str | None) -> int:
    """Make dead, retrying and stalled records due now.

    With --as-is an incomplete record is taken without its missing styles, its marker or the end of its images; a file that
    somebody has open for writing still waits.
    """
    if bool(records) == everything:
        raise click.UsageError("name the records, or say --all")
    settings = _load(file)
    explainers = _explainers(settings, None, spool)
    paths = [_record(explainers, record) for record in records] if records else None
    chosen = _ledger(settings).retry(paths, spool=spool, as_is=as_is)
    for record in chosen:
        click.echo(printable(f"{record} {_after_retry(settings, record, spool, as_is)}"))
    for path in sorted(set(paths or ()) - set(chosen)):
        click.echo(printable(f"{path}: nothing of it is waiting; see: spoold status {path}"), err=True)
    if not chosen and paths is None:
        click.echo("nothing is waiting")
    return EX_OK


@cli.command()
@click.option("--exit-when-idle", is_flag=True, help="End once every picture is done.")
@click.option("--records", default=3, show_default=True, help="How many pictures the app drops.")
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path), help="Work here, and keep it; a scratch directory otherwise."
)
def demo(exit_when_idle: bool, records: int, directory: Path | None) -> int:
    """Show the whole job with nothing set up.

    An embedded S3 server on loopback, a scratch spool, an app that drops pictures, and the daemon at work: see records
    arrive, go up and disappear, and drop your own. Needs the extra: pip install 'spoold[demo]'
    """
    from spoold.demo import run_demo

    return run_demo(directory=directory, exit_when_idle=exit_when_idle, records=records, console=click.echo)


@cli.command()
def version() -> int:
    """Print the versions of spoold and what it stands on."""
    click.echo(f"spoold {__version__}")
    click.echo(f"Python {platform.python_version()} on {platform.platform()}")
    click.echo(", ".join(f"{name} {version_of(name)}" for name in _DEPENDENCIES))
    return EX_OK


def main() -> None:
    """Run a command and exit with its code; what went wrong is one line on standard error, with the remedy."""
    # Taking a lease makes the kernel send us SIGIO when somebody wants the file; its default would end us (FACTS 15).
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        code = cli.main(standalone_mode=False, prog_name="spoold")
    except click.UsageError as error:
        error.show()
        code = EX_USAGE
    except click.ClickException as error:
        error.show()
        code = EX_USAGE
    except (click.Abort, KeyboardInterrupt):
        code = 128 + signal.SIGINT
    except ConfigError as error:
        click.echo(str(error), err=True)
        code = EX_CONFIG
    except SpooldError as error:
        click.echo(printable(f"spoold: {error}" + (f"; {error.hint}" if error.hint else "")), err=True)
        code = EX_UNAVAILABLE
    except SystemExit:  # click's answer to a reader that left early, as in `spoold status | head -1`
        code = EX_OK
    except Exception:
        traceback.print_exc()
        click.echo("spoold: this is a bug of spoold's; please report it with what stands above", err=True)
        code = EX_SOFTWARE
    gc.freeze()  # else the interpreter looks for garbage in all that was imported, on its way out: 0.3 s, 2026-11
    sys.exit(code or EX_OK)


# Below: what the commands share


def _load(file: str) -> config.Settings:
    return config.load(file)


def _ledger(settings: config.Settings) -> Ledger:
    try:
        return Ledger(settings.ledger_url, clock=SystemClock(), create=False)
    except LedgerUnavailable as error:
        if faults := list(filter(None, living(settings.state_dir / OWNERS) or ())):
            raise LedgerUnavailable(str(error), hint=f"the daemon says: {faults[0]}") from error
        raise


def _ledger_or_none(settings: config.Settings) -> Ledger | None:
    try:
        return _ledger(settings)
    except LedgerUnavailable as error:
        if "there is none yet" in str(error):
            return None
        raise


def _explainers(settings: config.Settings, ledger: Ledger | None, spool: str | None) -> list[Explainer]:
    chosen = [each for each in settings.spools if spool in (None, each.name)]
    if not chosen:
        raise click.UsageError(f"there is no spool {spool}; the spools are {', '.join(s.name for s in settings.spools)}")
    return [Explainer(settings=each, ledger=ledger, clock=SystemClock()) for each in chosen]


def _after_retry(settings: config.Settings, record: str, spool: str | None, as_is: bool) -> str:
    """Say what `retry` changed: an incomplete record is not taken unless it was said so."""
    rows = _ledger(settings).record_status(record, spool=spool)
    if not as_is and any(row["state"] in ("receiving", "stalled") for row in rows):
        return f"is not complete yet; to take it as it lies: spoold retry --as-is {record}"
    return "is due now"


def _record(explainers: list[Explainer], path: str) -> str:
    for explainer in explainers:
        relative = explainer.relative(path)
        if relative is not None:
            return relative
    raise SpooldError(f"{path}: it lies in no spool", hint="RECORD is the record's directory below the spool's root")


def _run(file: str, settings: config.Settings, once: bool) -> int:
    """Run daemons, one after the other, until one ends for another reason than new settings or a new ledger."""
    from spoold.daemon import LEDGER_LOST, Daemon  # its imports cost half a second

    signals = _Signals(file)
    while True:
        logs.configure(format=settings.log.format, level=settings.log.level)
        logs.tell_of_threads()
        daemon = Daemon(settings, once=once)
        signals.attach(daemon.stop)
        code = daemon.run()
        sys.stdout.flush()
        if code == EX_SOFTWARE or (code == EX_TEMPFAIL and not once):
            os._exit(code)  # threads that did not end in time must not hold us
        if code == LEDGER_LOST:
            settings = signals.settings or settings
        elif signals.settings is None:
            return code
        else:
            settings = signals.settings


class _Signals:
    """SIGTERM and SIGINT drain, a second one exits at once; SIGHUP drains too, then the new settings take over.

    settings: what SIGHUP found since the last `attach`, or None. A bad file changes nothing.
    """

    def __init__(self, file: str) -> None:
        self.settings: config.Settings | None = None
        self._file = file
        self._stop: Callable[[], None] = lambda: None
        self._is_ending = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        signal.signal(signal.SIGHUP, self._reload)

    def attach(self, stop: Callable[[], None]) -> None:
        """Signals go to another daemon from now on; one that came while it was built is not forgotten."""
        self.settings = None
        self._stop = stop
        if self._is_ending:
            stop()

    def _end(self, *_: Any) -> None:
        if self._is_ending:
            os._exit(EX_TEMPFAIL)
        self._is_ending = True
        self.settings = None
        self._stop()

    def _reload(self, *_: Any) -> None:
        log = structlog.get_logger()
        try:
            settings = config.load(self._file)
        except ConfigError as error:
            for problem in error.problems:
                log.error("config.refused", detail=str(problem), hint="the settings that are in force stay so")
            return
        if not self._is_ending:
            log.info("config.reloaded", path=self._file)
            self.settings = settings
            self._stop()


def _dry_run(settings: config.Settings) -> int:
    ledger = _ledger_or_none(settings)
    goes = stays = 0
    for explainer in _explainers(settings, ledger, None):
        for planned in explainer.plan():
            path = printable(planned.path)
            if planned.key is not None:
                goes += 1
                click.echo(printable(f"{planned.spool}: {path} -> s3://{planned.bucket}/{planned.key}"))
            else:
                stays += 1
                click.echo(printable(f"{planned.spool}: {path} stays: {planned.reason}"))
    click.echo(f"{goes} would go up, {stays} would stay; nothing was touched")
    return EX_OK


def _status_of(settings: config.Settings, ledger: Ledger, record: str, spool: str | None, as_json: bool) -> int:
    explainers = {explainer.spool.name: explainer for explainer in _explainers(settings, ledger, spool)}
    path = _record(list(explainers.values()), record)
    rows = ledger.record_status(path, spool=spool)
    if not rows:
        click.echo(printable(f"spoold: record {path} is not known; see: spoold why {path}"), err=True)
        return EX_UNAVAILABLE
    cards = []
    for row in rows:
        objects = ledger.record_objects(path, spool=row["spool"])
        history = ledger.record_history(path, spool=row["spool"])
        explainer = explainers.get(row["spool"])
        why = explainer.why(path) if explainer is not None else "this configuration has no such spool (any more)"
        cards.append({**row, "why": why, "objects": objects, "history": history})
    if as_json:
        click.echo(json.dumps(cards[0] if len(cards) == 1 else cards, indent=2))
        return EX_OK
    for card in cards:
        terminal.show(terminal.card_of(card))
    return EX_OK
