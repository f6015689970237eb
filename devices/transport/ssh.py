"""A board's RPC server through the system's ssh: a tunnel to the server, which is started where none runs."""

from __future__ import annotations

import contextlib
import secrets
import shlex
import shutil
import socket
from collections.abc import Iterator, Sequence
from typing import NoReturn

from netship.devices.transport.link import Address, Note
from netship.devices.transport.process import Process
from netship.targets.errors import UserError, last_line

SERVER_PORT = 9090
_ALIVE_SECONDS = 5
_CONNECT_SECONDS = 10
_START_SECONDS = 20.0
_END_SECONDS = 5.0

_OPTIONS = (
    # ssh asks nothing: keys come from its agent or ~/.ssh.
    *("-T", "-o", "BatchMode=yes"),
    *("-o", "ExitOnForwardFailure=yes"),
    # A tunnel that ends with this process, not one of the user's shared connections.
    *("-o", "ControlMaster=no", "-o", "ControlPath=none"),
    *("-o", f"ConnectTimeout={_CONNECT_SECONDS}"),
    *("-o", f"ServerAliveInterval={_ALIVE_SECONDS}", "-o", "ServerAliveCountMax=3"),
)

# A running server is found by its listening socket (state 0A of /proc/net/tcp); only root and the server can read its key.
_SERVE = """\
read key
if grep -Eq ' (0100007F|00000000):{service:04X} 00000000:0000 0A ' /proc/net/tcp 2>/dev/null; then
    file=/etc/netship/key
    if [ ! -e /etc/netship ]; then echo service
    elif found=$(cat $file 2>/dev/null || sudo -n cat $file 2>/dev/null); then echo "service $found"
    else echo locked
    fi
    exec cat >/dev/null
fi
if [ ! -x netship/serve ]; then echo "missing $(uname -m)"; exit; fi
echo started
{{ echo "$key"; exec cat; }} | netship/serve --port {port} --key-stdin --end-with-stdin
"""


@contextlib.contextmanager
def open_server(
    destination: str,
    key: str | None = None,
    port: int = SERVER_PORT,
    on_note: Note = lambda line: None,
) -> Iterator[Address]:
    """The RPC server of a board: the one that runs there, else the kit's in ~/netship for as long as the context lasts.

    Args:
        destination: as ssh takes it: ``USER@HOST``, a name of ~/.ssh/config, ``ssh://USER@HOST:PORT``.
        key: the running server's; read from /etc/netship/key there where None.
        port: where a running one listens, on 127.0.0.1.
        on_note: called with a line where the kit's server is started.

    Returns:
        the address here, which leads there through a tunnel.

    Raises:
        UserError: no ssh, the host is unknown or its key changed, nobody answers, or it lets nobody in;
            there is neither a server nor a kit, or the server does not start.
    """
    # A port that is free here is likely to be free there; if not, the command can be run again.
    running, own, there = _free_ports(3)
    new_key = secrets.token_hex(16)
    forwards = [(running, port), (own, there)]
    script = _SERVE.format(service=port, port=there)
    with contextlib.closing(_Ssh(destination, forwards, script)) as ssh:
        ssh.send_line(new_key)
        answer = ssh.read_line(_CONNECT_SECONDS + _START_SECONDS) or ""
        word, _, rest = answer.partition(" ")
        if word == "service" or (word == "locked" and key is not None):
            known = rest if key is None else key
            yield Address("127.0.0.1", running, known, destination)
        elif word == "started":
            if not (ssh.read_line(_START_SECONDS) or "").startswith("listening"):
                ssh.explain("netship/serve did not start there: ")
            on_note(f"started ~/netship/serve on {destination} for this command")
            yield Address("127.0.0.1", own, new_key, destination)
        elif word == "missing":
            machine = rest if rest in ("aarch64", "x86_64") else "arm"
            raise UserError(
                f"{destination}: no server listens on its port {port} and no kit lies in ~/netship; run `python -m "
                f"runtime_demo.board kit --machine {machine} --output kit.tar.gz && ssh {destination} "
                "'mkdir -p netship && tar xzf - -C netship' < kit.tar.gz`, then try again"
            )
        elif word == "locked":
            raise UserError(
                f"{destination}: a server runs there, but /etc/netship/key cannot be read by this user; "
                f"give its content with --key (`ssh -t {destination} sudo cat /etc/netship/key`)"
            )
        else:
            ssh.explain()


def run(destination: str, script: str, seconds: float = 20.0) -> str:
    """Run a shell script there; what it prints."""
    script = f"{script}\necho; echo netship-end"
    with contextlib.closing(_Ssh(destination, [], script)) as ssh:
        lines: list[str] = []
        while (line := ssh.read_line(seconds)) != "netship-end":
            if line is None:
                ssh.explain()
            lines.append(line)
        return "\n".join(lines).strip()


class _Ssh(Process):
    """A run of ssh; closing it closes the tunnel and ends the command there."""

    def __init__(
        self, destination: str, forwards: Sequence[tuple[int, int]], script: str
    ) -> None:
        program = shutil.which("ssh")
        if program is None:
            raise UserError("no ssh here; install it with `apt install openssh-client`")
        if destination.startswith("-") or not destination.strip():
            raise UserError(f"--ssh {destination!r}: is not USER@HOST")
        self._destination = destination
        tunnels = [
            word
            for here, there in forwards
            for word in ("-L", f"127.0.0.1:{here}:127.0.0.1:{there}")
        ]
        # A POSIX shell runs the script, whatever the login shell is.
        command = f"exec sh -c {shlex.quote(script)}"
        super().__init__([program, *_OPTIONS, *tunnels, "--", destination, command])

    def explain(self, before: str = "") -> NoReturn:
        """Raise what ssh printed as one line that says what to do."""
        code, said, where = self.code_within(1), self.said(), self._destination
        for words, problem in _PROBLEMS:
            if words.lower() in said.lower():
                raise UserError(f"{where}: {problem.format(where=where)}")
        last = "ssh said nothing in time"
        if code is not None or said.strip():
            last = last_line(said, f"ssh ended ({code})")
        raise UserError(f"{where}: {before}{last}; try `ssh {where} true`")

    def close(self) -> None:
        self.end(_END_SECONDS)


# Messages of ssh (OpenSSH's ssh.c, sshconnect.c, sshconnect2.c), and what a user can do.
_PROBLEMS = (
    (
        "Could not resolve hostname",
        "unknown host; check its name, or give its address (`hostname -I` on the board)",
    ),
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key has changed; if that is right, run `ssh-keygen -R` on its name, then log in with `ssh {where}`",
    ),
    (
        "Host key verification failed",
        "its host key is not known yet; log in once with `ssh {where}` and compare the key",
    ),
    (
        "Permission denied",
        "permission denied; it must let you in without a password: `ssh-copy-id {where}`",
    ),
    (
        "Too many authentication failures",
        "permission denied; name one key with IdentityFile in ~/.ssh/config",
    ),
    (
        "Connection refused",
        "nobody listens on its ssh port; switch SSH on there (`sudo systemctl enable --now ssh`)",
    ),
    ("Connection timed out", "no answer; check that it is on and in this network"),
    ("No route to host", "no route to it; check that it is on and in this network"),
    ("Address already in use", "a port of the tunnel is taken; try again"),
    (
        "administratively prohibited",
        "its ssh server forbids tunnels; set AllowTcpForwarding yes in its sshd_config",
    ),
)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [int(free.getsockname()[1]) for free in sockets]
