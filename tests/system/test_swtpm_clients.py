"""The programs that people use a vTPM of swtpm's with: the same with ours in its place."""

import re
import socket
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from tests.harness.swtpm_program import OURS, Place
from tests.support import tpm2
from tests.support.emulator_client import ControlClient
from tests.support.tpm2 import Tpm
from vtpmd.wire.tpm import TpmVersion

EK_CERTIFICATE = 0x1C00002  # TCG EK Credential Profile, 2.2.1.4: RSA 2048
EK_HANDLE = 0x81010001
PLATFORM_CERTIFICATE = 0x1C08000
SETUP_TIMEOUT_S = 120  # RSA keys


def run(*command: str | Path, directory: Path) -> str:
    """Run a program, which must succeed; return its standard output."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=directory,
        check=False,
        capture_output=True,
        text=True,
        timeout=SETUP_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# swtpm_setup, which makes what a vendor puts into a TPM.


def setup(place: Place, *more: str) -> str:
    """Run swtpm_setup on a place; its certificate authority is of this test alone."""
    authority = place.directory / "authority"
    authority.mkdir(exist_ok=True)
    names = {"statedir": "", "signingkey": "key.pem", "issuercert": "cert.pem"}
    names["certserial"] = "serial"
    lines = [f"{name} = {authority / file}" for name, file in names.items()]
    (authority / "conf").write_text("\n".join(lines) + "\n")
    about = [f"--platform-{what} test\n" for what in ("manufacturer", "version", "model")]
    (authority / "options").write_text("".join(about))
    (authority / "setup.conf").write_text(
        "create_certs_tool = /usr/bin/swtpm_localca\n"
        f"create_certs_tool_config = {authority / 'conf'}\n"
        f"create_certs_tool_options = {authority / 'options'}\n"
        "active_pcr_banks = sha256\n"
    )
    log = place.directory / "setup.log"
    run(
        *("swtpm_setup", *place.version_options, "--tpm", f"{place.program} socket"),
        *("--config", authority / "setup.conf", "--tpm-state", place.state, "--logfile", log),
        *more,
        directory=place.directory,
    )
    return log.read_text()


def banks_of(place: Place) -> bytes:
    """Return which PCR banks are allocated: TPM2_GetCapability of TPM_CAP_PCRS."""
    place.start()
    with ControlClient(place.control) as control, closing(control.attach_data()) as data:
        control.init()
        Tpm(data.transact).startup()
        answer = data.transact(bytes.fromhex("8001 00000016 0000017a 00000005 00000000 00000001"))
        control.shutdown()
    return answer


@pytest.mark.parametrize("bits", ["2048", "3072"])
def test_swtpm_setup_makes_keys_and_certificates(ours: Place, bits: str) -> None:
    options = ["--createek", "--create-ek-cert", "--create-platform-cert", "--lock-nvram"]
    log = setup(ours, *options, "--not-overwrite", "--rsa-keysize", bits)
    assert f"Successfully created RSA {bits} EK" in log
    assert "Successfully created ECC EK" in log
    assert "Successfully authored TPM state" in log
    assert [path.name for path in ours.state.iterdir() if path.suffix] == ["tpm2-00.permall"]
    ours.start()
    with ControlClient(ours.control) as control, closing(control.attach_data()) as data:
        control.init()
        tpm = Tpm(data.transact)
        tpm.startup()
        for index in (EK_CERTIFICATE if bits == "2048" else 0x1C0001C, PLATFORM_CERTIFICATE):
            assert tpm.nv_read(index, 2) == b"\x30\x82"  # a certificate begins so


def test_swtpm_setup_makes_a_tpm_12_with_an_owner(tmp_path: Path) -> None:
    place = Place(OURS, tmp_path, TpmVersion.TPM_1_2)
    log = setup(place, "--createek", "--take-ownership", "--create-ek-cert", "--lock-nvram")
    assert "Successfully created EK" in log
    assert "Successfully authored TPM state" in log
    assert [path.name for path in place.state.iterdir() if path.suffix] == [place.names.permanent]
    place.start("--flags", "not-need-init,startup-clear")
    try:
        ioctl(place, "-h", "measured")
        for name in ("permanent", "volatile"):
            ioctl(place, "--save", name, place.directory / name)
        ioctl(place, "--stop")
        for name in ("permanent", "volatile"):
            ioctl(place, "--load", name, place.directory / name)
        ioctl(place, "-i")
        assert '"family":"1.2"' in ioctl(place, "--info", "1")
        ioctl(place, "-s")
    finally:
        place.end()


def test_swtpm_setup_changes_the_banks_of_a_tpm_that_is_there(ours: Place) -> None:
    setup(ours, "--pcr-banks", "sha256")
    sha256_alone = banks_of(ours)
    log = setup(ours, "--reconfigure", "--pcr-banks", "sha256,sha384")
    assert "Successfully activated PCR banks sha256,sha384" in log
    assert banks_of(ours) != sha256_alone


def test_swtpm_setup_makes_a_tpm_in_a_linear_file(place: Place) -> None:
    """As libvirt has it do for ``<source type='file'>``: a file that is there is begun anew."""
    file = place.directory / "linear"
    for _ in range(2):
        log = setup(place, "--tpm-state", f"file://{file}", "--createek", "--overwrite")
        assert "Successfully authored TPM state" in log
    place.start("--tpmstate", f"backend-uri=file://{file}")
    with ControlClient(place.control) as control, closing(control.attach_data()) as data:
        control.init()
        tpm = Tpm(data.transact)
        tpm.startup()
        tpm.execute(tpm2.read_public(EK_HANDLE))  # is there


def test_swtpm_setup_encrypts_with_a_password(ours: Place) -> None:
    (ours.directory / "password").write_text("secret\n")
    (ours.directory / "password").chmod(0o600)
    option = f"pwdfile={ours.directory / 'password'},mode=aes-256-cbc"
    setup(ours, "--pwdfile", str(ours.directory / "password"), "--cipher", "aes-256-cbc")
    ours.start("--key", option)
    with ControlClient(ours.control) as control:
        assert control.get_config() == 1
        control.init()


# swtpm_ioctl and swtpm_bios: each option, with both programs.


def ioctl(place: Place, *options: str | Path) -> str:
    return run("swtpm_ioctl", "--unix", place.control, *options, directory=place.directory)


def test_swtpm_ioctl_has_what_it_asks_for(place: Place) -> None:
    place.start()
    assert re.match(r"ptm capability is 0x[0-9a-f]+\n", ioctl(place, "-c"))
    ioctl(place, "-i")
    assert ioctl(place, "-e") == "tpmEstablished is 0\n"
    ioctl(place, "-h", "measured")
    assert ioctl(place, "-e") == "tpmEstablished is 1\n"
    ioctl(place, "-r", "3")
    assert ioctl(place, "-e") == "tpmEstablished is 0\n"
    ioctl(place, "-l", "2")
    ioctl(place, "-C")
    ioctl(place, "-v")
    assert (place.state / "tpm2-00.volatilestate").exists()
    assert ioctl(place, "-g") == "ptm configuration flags: 0x0\n"
    assert "TPMSpecification" in ioctl(place, "--info", "1")
    states = {name: place.directory / name for name in ("permanent", "volatile")}
    for name, path in states.items():
        ioctl(place, "--save", name, path)
        assert path.stat().st_size > 1000
    ioctl(place, "--stop")
    assert "4096" in ioctl(place, "-b", "4096")
    for name, path in states.items():
        ioctl(place, "--load", name, path)
    ioctl(place, "-i")
    ioctl(place, "-s")


@pytest.mark.parametrize("options", [[], ["-c", "-cs"], ["-n"], ["-o"], ["-u"]], ids=" ".join)
def test_swtpm_bios_starts_it(place: Place, options: list[str]) -> None:
    data = place.directory / "data"
    flags = "startup-clear" if "-n" in options else "not-need-init"
    place.start("--server", f"type=unixio,path={data}", "--flags", flags)
    run("swtpm_bios", "--tpm2", "--unix", data, *options, directory=place.directory)


# tpm2-tools over tpm2-tss' TCTI for swtpm: the data channel on a TCP port, control on the next.


def free_ports() -> int:
    """Return the first of two TCP ports in a row that are free now."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = int(first.getsockname()[1])
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except OSError:
                continue
            return port


def test_tpm2_tools_work_a_key_and_seal(place: Place) -> None:
    port = free_ports()
    place.start(
        *("--ctrl", f"type=tcp,port={port + 1}", "--server", f"type=tcp,port={port}"),
        *("--flags", "not-need-init,startup-clear"),
    )

    def tool(name: str, *options: str) -> str:
        tcti = ("-T", f"swtpm:host=127.0.0.1,port={port}")
        return run(f"tpm2_{name}", *tcti, *options, directory=place.directory)

    (place.directory / "secret").write_bytes(b"kept")
    tool("createprimary", "-C", "o", "-G", "ecc", "-c", "primary.ctx")
    tool("create", "-C", "primary.ctx", "-i", "secret", "-u", "sealed.pub", "-r", "sealed.priv")
    tool("flushcontext", "-t")
    tool("load", "-C", "primary.ctx", *("-u", "sealed.pub", "-r", "sealed.priv", "-c", "s.ctx"))
    tool("flushcontext", "-t")
    assert tool("unseal", "-c", "s.ctx") == "kept"
    tool("pcrextend", f"8:sha256={'11' * 32}")
    assert "8 : 0x" in tool("pcrread", "sha256:8")
    tool("nvdefine", "0x1500001", "-C", "o", "-s", "4", "-a", "ownerread|ownerwrite")
    tool("nvwrite", "0x1500001", "-C", "o", "-i", "secret")
    assert tool("nvread", "0x1500001", "-C", "o") == "kept"
    tool("shutdown")


def test_capabilities_are_what_swtpm_setup_offers_keys_by(ours: Place) -> None:
    printed = run(
        "swtpm_setup", "--tpm", f"{OURS} socket", "--print-capabilities", directory=ours.directory
    )
    for size in (2048, 3072):
        assert f"tpm2-rsa-keysize-{size}" in printed
