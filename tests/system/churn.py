"""Connections that come and go, as an application and its service: run in a lab's namespaces.

    python -m tests.system.churn serve PORT
    python -m tests.system.churn ask PORT PER_SECOND SECONDS

`ask` sends CONTENT on each connection, ends its direction and reads the same back. It prints one line of JSON: how many
connections were opened, and how many were whole.
"""

import asyncio
import json
import os
import sys
import time

CONTENT = os.urandom(5_000)
MOST = 400
"""At a time."""


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
        writer.write_eof()
        await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def serve(port: int) -> None:
    server = await asyncio.start_server(echo, "127.0.0.1", port, backlog=MOST)
    await server.serve_forever()


class Client:
    def __init__(self, port: int) -> None:
        self.opened = self.whole = 0
        self._port = port
        self._places = asyncio.Semaphore(MOST)

    async def run(self, per_second: float, seconds: float) -> None:
        began_s = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            while (passed_s := time.monotonic() - began_s) < seconds:
                while self.opened < passed_s * per_second:
                    await self._places.acquire()
                    self.opened += 1
                    tasks.create_task(self._exchange())
                await asyncio.sleep(0.005)

    async def _exchange(self) -> None:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            writer.write(CONTENT)
            writer.write_eof()
            received = await asyncio.wait_for(reader.read(-1), 30)
            self.whole += received == CONTENT
            writer.close()
        except OSError:
            pass
        finally:
            self._places.release()


async def ask(port: int, per_second: float, seconds: float) -> None:
    client = Client(port)
    await client.run(per_second, seconds)
    print(json.dumps({"opened": client.opened, "whole": client.whole}))


if __name__ == "__main__":
    role, port, *rest = sys.argv[1:]
    asyncio.run(serve(int(port)) if role == "serve" else ask(int(port), float(rest[0]), float(rest[1])))
