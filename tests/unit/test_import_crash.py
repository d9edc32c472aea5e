"""An import has happened as a whole, or not at all, whichever step a crash comes at.

What a crash left is made what a vTPM starts from, as `vtpmd run` does it: twice, with a crash at
each of those steps, too. The permanent state is then the old one, with all that was there, or the
imported one, with all that was there in files of other names; and never is there a moment without
one, in which another program would make a new TPM.
"""

from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness.dying import Killed, dying
from tests.support import states
from tests.support.journal import write_journal
from vtpmd import cli
from vtpmd.cli import importing
from vtpmd.store.anchor import Anchor, Mark
from vtpmd.store.directory import FileNames, StateDirectory, names_of
from vtpmd.store.keys import Key
from vtpmd.store.libtpms import States
from vtpmd.store.moving import MovingFiles
from vtpmd.store.recovery import RecoveryRefused, recover
from vtpmd.store.start import anchor_of, start
from vtpmd.wire.export_format import Header
from vtpmd.wire.swtpm_format import Lineage
from vtpmd.wire.tpm import EPOCH_GENERATIONS, StateType, TpmVersion

IDENTITY, OTHER = b"of the old state", b"of the exported."


class Of(NamedTuple):
    """Permanent states of a TPM of one version, and its volatile one."""

    before: list[bytes]  # of what is imported into: in its file, and on top of that in its journal
    new: bytes
    volatile: bytes

    @property
    def imported(self) -> States:
        """What is imported."""
        return {StateType.PERMANENT: self.new, StateType.VOLATILE: self.volatile}


STATES_OF = {
    TpmVersion.TPM_1_2: Of(states.different_12(2), states.BUSY_12, states.BUSY_12_VOLATILE),
    TpmVersion.TPM_2_0: Of(states.different(2), states.BUSY, states.BUSY_VOLATILE),
}
THIRD = states.different(3)[-1]  # of a TPM 2.0
EXPORTED = Header(b"e" * 16, OTHER, 41, 0, TpmVersion.TPM_2_0, tuple(StateType)[:2])
OF_A_NEW_TPM = EXPORTED._replace(is_new=True)
ANOTHER = EXPORTED._replace(export=b"f" * 16, identity=b"of a third one..", generation=77)
KEY = b"k" * 32
STEPS_MAX = 200
STRIDE = 7  # of the second import's steps: all of them come, with one or other of the first's
AFTER_ANCHOR = 10  # steps, of an anchor that is written and the old states' new names


class Setting(NamedTuple):
    """A directory that is imported into, and the key that it has."""

    directory: Path
    key: Key | None
    anchor: Path | None = None
    exported: Header = EXPORTED

    @property
    def names(self) -> FileNames:
        """What the files are called."""
        return names_of(self.exported.version)

    @property
    def states(self) -> Of:
        """The states of the TPMs there."""
        return STATES_OF[self.exported.version]

    def open(self) -> StateDirectory:
        """Open the directory."""
        return StateDirectory.open(self.directory, version=self.exported.version)

    def run(self) -> None:
        """Import, as the command does once it has read the export."""
        self._import(self.exported, self.states.imported)

    def run_another(self) -> None:
        """Import another export, of another vTPM, without a volatile state."""
        self._import(ANOTHER, {StateType.PERMANENT: THIRD})

    def _import(self, exported: Header, its: States) -> None:
        options = Namespace(directory=self.directory, force=True, anchor=self.anchor)
        with ExitStack() as stack:
            importing._import(stack, options, exported, its, self.key)

    def start(self) -> bytes | None:
        """Start a vTPM; return its permanent state."""
        with self.open() as directory:
            files = MovingFiles(directory, self.key)
            try:
                with anchor_of(None, directory, files, self.key) as anchor:
                    return start(directory, files, self.key, anchor).states.get(StateType.PERMANENT)
            finally:
                files.close()

    def contents(self) -> dict[str, bytes]:
        """Return what is there, but for the lock, and what is half written."""
        return {
            path.name: path.read_bytes()
            for path in self.directory.iterdir()
            if path.name != ".lock" and not path.name.startswith("TMP")
        }


def write(setting: Setting, lineage: Lineage) -> None:
    """Have a vTPM in a state directory, with a journal on top, and a volatile state."""
    before = setting.states.before
    with setting.open() as directory:
        directory.write_state(StateType.PERMANENT, before[0], setting.key, lineage)
        directory.write_state(StateType.VOLATILE, b"of then", setting.key, None)
    secret = None if setting.key is None else setting.key.journal_secret()
    journal = write_journal(before, identity=lineage.identity, secret=secret)
    (setting.directory / setting.names.journal).write_bytes(journal)


COPIES = ("empty", "full", "full and sealed")
NEW_TPMS = (
    *("full, and a new TPM comes", "empty, and a new TPM 1.2 comes"),
    *("full, and a new TPM 1.2 comes", "full, and a new TPM 1.2 comes, sealed"),
)


@pytest.fixture(params=[*COPIES, *NEW_TPMS])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Setting]:
    """Give what makes a setting, each time a new one."""
    key = Key(bytearray(KEY)) if "sealed" in request.param else None
    made = 0

    def new() -> Setting:
        nonlocal made
        made += 1
        directory = tmp_path / f"into-{made}"
        directory.mkdir()
        exported = OF_A_NEW_TPM if "comes" in request.param else EXPORTED
        if "1.2" in request.param:
            exported = exported._replace(version=TpmVersion.TPM_1_2)
        setting = Setting(directory, key, exported=exported)
        if not request.param.startswith("empty"):
            write(setting, Lineage(IDENTITY, 1, continued=True))
        return setting

    return new


@pytest.fixture(scope="module", autouse=True)
def _loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Have all modules loaded that an import needs: pytest makes directories for them, as steps."""
    Setting(tmp_path_factory.mktemp("first"), None).run()


def assert_imported(setting: Setting, before: dict[str, bytes]) -> None:
    """Look at what an import has left: all of it, and all that was there before."""
    after = setting.contents()
    with setting.open() as directory:
        is_new = setting.exported.is_new
        becomes = 1 if is_new else EPOCH_GENERATIONS
        assert directory.read_lineage() == Lineage(OTHER, becomes)
        assert directory.read_state(StateType.VOLATILE, setting.key) == setting.states.volatile
        record = MovingFiles(directory).owner.read()
        assert record.generation == becomes
        forks = [] if is_new else ["of generation 41"]
        assert [fork.peer[-len("of generation 41") :] for fork in record.forks] == forks
    assert {
        f"{name}.before-1": content for name, content in before.items()
    }.items() <= after.items()
    assert len(after) == len(before) + 3  # permanent and volatile state, owner record


def count_steps(setting: Setting) -> int:
    """Import, and return in how many steps."""
    with dying(None) as steps:
        setting.run()
    return steps.done


def test_import_that_dies_at_any_step(make: Callable[[], Setting]) -> None:
    whole = make()
    before = whole.contents()
    n_steps = count_steps(whole)
    assert_imported(whole, before)
    outcomes = set()
    for at in range(n_steps):
        setting = make()
        before = setting.contents()
        with pytest.raises(Killed), dying(at):
            setting.run()
        assert not before or (setting.directory / setting.names.permanent).exists(), at
        found = setting.start()
        outcomes.add(found)
        if found == setting.states.new:
            assert_imported(setting, before)
        else:
            assert found == (setting.states.before[-1] if before else None), at
    assert outcomes == {setting.states.new, setting.states.before[-1] if before else None}


def test_start_after_it_that_dies_at_any_step(make: Callable[[], Setting]) -> None:
    """The import's last step is all that is left to do, or its first."""
    n_import = count_steps(make())
    committed = next(at for at in range(n_import) if commits_before(make(), at))
    n_start = STEPS_MAX
    for at in range(STEPS_MAX):
        if at >= n_start:
            break
        setting = make()
        before = setting.contents()
        with pytest.raises(Killed), dying(committed):
            setting.run()
        try:
            with dying(at):
                assert setting.start() == setting.states.new
            n_start = at
        except Killed:
            assert not before or (setting.directory / setting.names.permanent).exists(), at
            assert setting.start() == setting.states.new
        assert_imported(setting, before)
    assert 5 < n_start < STEPS_MAX


def commits_before(setting: Setting, at: int) -> bool:
    """Return whether an import that dies at a step has happened."""
    with pytest.raises(Killed), dying(at):
        setting.run()
    return (setting.directory / setting.names.importing).exists()


@pytest.mark.parametrize("make", COPIES, indirect=True)
def test_anchor_hears_of_an_import_before_it_happens(
    make: Callable[[], Setting], tmp_path: Path
) -> None:
    """So a start with the anchor takes it up after a crash, and refuses one without its word.

    Of a new TPM an anchor that has begun is refused: tests/unit/test_replacement.py.
    """
    path = tmp_path / "anchor"
    n_steps = count_steps(make())
    committed = next(at for at in range(n_steps) if commits_before(make(), at))
    for is_told in (True, False):
        setting = make()
        path.unlink(missing_ok=True)
        with Anchor.open(path, setting.directory, is_new=True) as anchor:
            anchor.write(Mark(IDENTITY, 2, recovered(setting)))
        if is_told:
            setting = setting._replace(anchor=path)
        with pytest.raises(Killed), dying(committed + (AFTER_ANCHOR if is_told else 0)):
            setting.run()
        words = ["fold", str(setting.directory), "--anchor", str(path), *key_words(setting)]
        assert cli.main(words) == (0 if is_told else 6)


def key_words(setting: Setting) -> list[str]:
    """Return what gives a command the directory's key."""
    if setting.key is None:
        return []
    file = setting.directory.with_name("key")
    file.write_text(setting.key.material.hex())
    file.chmod(0o600)
    return ["--key", f"file={file},mode=aes-256-cbc"]


def recovered(setting: Setting) -> bytes:
    """Return the digest of what is there."""
    with setting.open() as directory:
        return recover(directory, setting.key).found.digest or bytes(32)


def test_interrupted_import_is_told_of(
    make: Callable[[], Setting], capsys: pytest.CaptureFixture[str]
) -> None:
    n_steps = count_steps(make())
    committed = next(at for at in range(n_steps) if commits_before(make(), at))
    setting = make()
    with pytest.raises(Killed), dying(committed):
        setting.run()
    capsys.readouterr()
    for command in ("recover", "export", "status", "fold"):
        words = [command, str(setting.directory)]
        if command != "status":
            words += key_words(setting)
        if command == "export":
            words += ["--out", str(setting.directory / "out")]
        assert (cli.main(words) == 0) == (command == "fold")
        said = capsys.readouterr()
        assert command == "fold" or "import" in said.out + said.err
    assert setting.start() == setting.states.new


@pytest.mark.parametrize("is_damaged", [False, True], ids=["whole", "damaged"])
def test_another_import_takes_an_interrupted_ones_place(
    make: Callable[[], Setting], is_damaged: bool
) -> None:
    """Also of one that is damaged, which no start takes up. All that was there is kept."""
    n_steps = count_steps(make())
    committed = next(at for at in range(n_steps) if commits_before(make(), at))
    setting = make()
    before = setting.contents()
    with pytest.raises(Killed), dying(committed + 2):
        setting.run()
    if is_damaged:
        file = setting.directory / setting.names.importing
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(RecoveryRefused, match="cannot finish the import of"):
            setting.start()
    setting.run()
    assert setting.start() == setting.states.new
    after = setting.contents()
    for name, content in before.items():
        kept = {after.get(f"{name}.before-{number}") for number in (1, 2)}
        assert content in kept, name


@pytest.mark.parametrize("make", COPIES, indirect=True)
def test_import_of_another_file_over_one_that_died_at_any_step(make: Callable[[], Setting]) -> None:
    """It is that one's vTPM then, with nothing of the first; or, if it dies too, one of the three,
    whole. What was there at first is kept.
    """
    for at in range(STEPS_MAX):
        for then in (None, *range(at % STRIDE, STEPS_MAX, STRIDE)):
            setting = make()
            before = setting.contents()
            with suppress(Killed), dying(at) as first:
                setting.run()
            with suppress(Killed), dying(then) as second:
                setting.run_another()
            has_died = second.done == then
            found = setting.start()
            old = setting.states.before[-1] if before else None
            assert found in ((THIRD, setting.states.new, old) if has_died else (THIRD,)), (at, then)
            after = setting.contents()
            has_volatile = found != THIRD and found is not None
            assert (setting.names.volatile in after) == has_volatile, (at, then)
            assert found == old or set(before.values()) <= set(after.values()), (at, then)
            if found == THIRD:
                assert_another(setting)
            if not has_died and then is not None:
                break
        if first.done < at:
            return
    pytest.fail("an import has more steps than that")


def assert_another(setting: Setting) -> None:
    """Look at what the import of another export has left."""
    with StateDirectory.open(setting.directory) as directory:
        lineage, record = directory.read_lineage(), MovingFiles(directory).owner.read()
        assert lineage is not None and lineage.identity == ANOTHER.identity
        assert record.generation >= lineage.generation >= EPOCH_GENERATIONS
        assert record.forks[-1].export == ANOTHER.export.hex()
