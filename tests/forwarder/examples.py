"""Small valid configurations for tests to start from, or to break."""

import base64
from pathlib import Path

KEY = bytes(range(32))
KEY_TEXT = base64.b64encode(KEY).decode()

CLIENT = """role = "client"
[auth]
key_id = "laptop"
key_file = "laptop.key"
[[tunnel]]
name = "web"
mode = "stripe"
host = "server.example.net"
host_port = 9000
local_port = 8080
"""

SERVER = """role = "server"
[[client]]
key_id = "laptop"
key_file = "laptop.key"
[[tunnel]]
name = "web"
mode = "stripe"
host_port = 9000
remote_port = 80
"""

EXAMPLES = {"client": CLIENT, "server": SERVER}

SPRAY_CLIENT_TUNNEL = """[[tunnel]]
name = "kcp"
mode = "spray"
host = "server.example.net"
ports = "80,443,10000-10005"
ludp = "127.0.0.1:30000"
"""

SPRAY_SERVER_TUNNEL = """[[tunnel]]
name = "kcp"
mode = "spray"
ports = "80,443,10000-10005"
taddr = "127.0.0.1:9999"
"""

SPRAY_TUNNELS = {"client": SPRAY_CLIENT_TUNNEL, "server": SPRAY_SERVER_TUNNEL}
SPRAY_EXAMPLES = {role: text[: text.index("[[tunnel]]")] + SPRAY_TUNNELS[role] for role, text in EXAMPLES.items()}


def second(role: str, name: str = "ssh", port: int = 9001, here: str = "local_port = 8081", **more: str) -> str:
    """One more tunnel for an example."""
    text = f'[[tunnel]]\nname = "{name}"\nmode = "stripe"\nhost_port = {port}\n'
    text += f'host = "server.example.net"\n{here}\n' if role == "client" else "remote_port = 22\n"
    return text + "".join(f"{key} = {value}\n" for key, value in more.items())


def write(directory: Path, role: str, text: str | None = None) -> Path:
    """Writes ROLE.toml, and the key file that the examples name."""
    key_file = directory / "laptop.key"
    key_file.write_text(KEY_TEXT + "\n")
    key_file.chmod(0o600)
    file = directory / f"{role}.toml"
    file.write_text(EXAMPLES[role] if text is None else text)
    return file
