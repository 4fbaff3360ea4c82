"""A private RabbitMQ whose node has a shell and a management API, for the commands of the manual."""

import subprocess

from testbed import Port, RabbitMQ


class RabbitMQNode(RabbitMQ):
    """A broker with a shell for operators. Plugins that the commands enable listen on loopback addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.management_port = Port()

    def _configuration(self) -> list[str]:
        address = ["management.tcp.ip = 127.0.0.1", f"management.tcp.port = {self.management_port}"]
        return [*super()._configuration(), *address]

    def shell(self, commands: str) -> str:
        """Run commands as an operator would on this node, and return their standard output."""
        variables = {
            "MANAGEMENT": f"http://127.0.0.1:{self.management_port}",
            "ADMIN": "guest",
            "PASSWORD": self.password,
            "PATH": f"{self._program('rabbitmq-plugins').parent}:/usr/bin:/bin",
        }
        environment = self._environment() | variables
        command = ["sh", "-e", "-c", commands]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def close(self) -> None:
        super().close()
        self.management_port.release()
