"""`pyswarm image`: the images of this host."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import IO

import click

from proto.local_pb2 import ImageListRequest, ImageProgress, ImageRemoveRequest, LoadChunk, PullRequest
from swarm.cli.client import TRANSFER_S, Client, connect
from swarm.cli.command import command, finish, listing_options, parse_filters, show_rows
from swarm.cli.completing import image_names
from swarm.cli.failure import ApiFailure, Failure
from swarm.cli.images import without_digest
from swarm.cli.registry_auth import find_credentials
from swarm.cli.rows import IMAGE_COLUMNS, image_rows

CHUNK_BYTES = 1 << 20
"""Of an archive: a quarter of gRPC's default message limit."""


@click.group()
def image() -> None:
    """Manage the images of this host.

    \b
    Example:
      pyswarm image pull nginx:1.27
      pyswarm image load -i web.tar
    """


@command(image, "ls")
@click.option("--digests", is_flag=True, help="Show digests.")
@listing_options(filters="reference")
def list_images(form: str | None, digests: bool, quiet: bool, no_trunc: bool, filters: tuple[str, ...]) -> None:
    """List the images in this host's store.

    \b
    Example:
      pyswarm image ls --filter 'reference=localhost:5000/*'
    """
    from fnmatch import fnmatchcase

    patterns = parse_filters(filters, ("reference",)).get("reference", [])
    client = connect()
    images = client.ask(client.local.ListImages, ImageListRequest()).images
    rows = image_rows(images, time.time(), no_trunc)
    if patterns:
        names = [(f"{row['Repository']}:{row['Tag']}", row["Repository"]) for row in rows]
        rows = [
            row
            for row, alike in zip(rows, names, strict=True)
            if any(fnmatchcase(name, pattern) for name in alike for pattern in patterns)
        ]
    columns = dict(IMAGE_COLUMNS)
    if digests:
        columns = {"Repository": "REPOSITORY", "Tag": "TAG", "Digest": "DIGEST", **IMAGE_COLUMNS}
    if quiet:
        rows = list({row["ID"]: row for row in rows}.values())
    show_rows(rows, columns, form, quiet)


@command(image, "pull")
@click.argument("name", shell_complete=image_names)
@click.option("--quiet", "-q", is_flag=True, help="Print only the name.")
def pull(name: str, quiet: bool) -> None:
    """Fetch an image from its registry, with this user's stored credentials.

    \b
    Example:
      pyswarm image pull nginx:1.27
    """
    client = connect()
    request = PullRequest(name=name, registry_auth=find_credentials(name, os.environ))
    last = _show(client.stream(client.local.PullImage, request, TRANSFER_S), quiet)
    if not quiet and last.image.id:
        digest = next(iter(last.image.digests), last.image.id).rpartition("@")[2]
        click.echo(f"Digest: {digest}")
    click.echo(next((without_digest(found) for found in last.names), name))


@command(image, "load")
@click.option("--input", "-i", "archive", type=click.Path(dir_okay=False), help="Archive (default: standard input).")
@click.option("--name", default="", help="Name for the image, instead of the archive's.")
@click.option("--quiet", "-q", is_flag=True, help="Print no progress.")
def load(archive: str | None, name: str, quiet: bool) -> None:
    """Load images from a docker-archive or oci-archive file.

    \b
    Example:
      pyswarm image load -i web.tar
      docker save web | pyswarm image load
    """
    client = connect()
    if archive is None and sys.stdin.isatty():
        raise Failure("there is nothing to load: give an archive with -i FILE, or on standard input")
    try:
        source = nullcontext(sys.stdin.buffer) if archive is None else open(archive, "rb")  # noqa: SIM115 (below)
    except OSError as error:
        raise Failure(f"cannot read {archive}: {error.strerror}") from None
    with source as stream:
        try:
            last = _show(_load(client, stream, name), quiet)
        except ApiFailure as failure:
            raise Failure(f"cannot load {archive or 'standard input'}: {failure.message}") from None
    for found in last.names:
        click.echo(f"Loaded image: {without_digest(found)}")


def _chunks(stream: IO[bytes], name: str) -> Iterator[LoadChunk]:
    yield LoadChunk(name=name)
    while data := stream.read(CHUNK_BYTES):
        yield LoadChunk(data=data)


def _load(client: Client, stream: IO[bytes], name: str) -> Iterator[ImageProgress]:
    import grpc

    from swarm.cli.client import api_failure

    try:
        yield from client.local.LoadImage(_chunks(stream, name), timeout=TRANSFER_S)
    except grpc.RpcError as error:
        raise api_failure(error) from None


def _show(progress: Iterator[ImageProgress], quiet: bool) -> ImageProgress:
    """Print what is going on; returns everything told, merged."""
    merged = ImageProgress()
    for item in progress:
        if item.message and not quiet:
            click.echo(item.message, err=True)
        merged.MergeFrom(item)
    return merged


@command(image, "rm")
@click.argument("refs", metavar="IMAGE...", nargs=-1, required=True, shell_complete=image_names)
@click.option("--force", "-f", is_flag=True, help="Even if the image has several names.")
def remove(refs: tuple[str, ...], force: bool) -> None:
    """Remove images from this host's store.

    \b
    Example:
      pyswarm image rm web:1
    """
    client = connect()
    failures: list[str] = []
    for ref in refs:
        try:
            reply = client.ask(client.local.RemoveImage, ImageRemoveRequest(ref=ref, force=force))
        except ApiFailure as failure:
            failures.append(failure.message)
            continue
        for name in reply.untagged:
            click.echo(f"Untagged: {without_digest(name)}")
        if reply.deleted:
            click.echo(f"Deleted: {reply.deleted}")
    finish(failures)
