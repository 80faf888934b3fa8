"""Commands that sign: make keys, begin and change a store's root of trust, vouch for versions and tags."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jobs.cli.options import Json, Store, print_json
from jobs.stages.signing import PASSPHRASE, load_keys

RootKeys = Annotated[list[str], typer.Option("--root-key", help="A root key: a PEM file, or env:NAME. Repeatable.")]
Keys = Annotated[list[str], typer.Option("--key", help="A key: a PEM file, or env:NAME. Repeatable.")]
Role = Literal["root", "publisher", "online"]

app = typer.Typer(
    rich_markup_mode=None,
    help=f"Keys and the root of trust. Key files may be encrypted: {PASSPHRASE} holds the passphrase.",
)


def register(main: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog="Example: nestquant keys generate publisher.pem")(generate)
    app.command(
        epilog="Example: nestquant keys init --store s3://models --root-key root.pem --publisher publisher.pem.pub "
        "--online online.pem.pub --out root.json"
    )(init)
    app.command(epilog="Example: nestquant keys add publisher new.pem.pub --store s3://models --root-key root.pem")(add)
    app.command(epilog="Example: nestquant keys rotate 3fa4 new.pem.pub --store s3://m --root-key root.pem")(rotate)
    app.command(epilog="Example: nestquant keys revoke 3fa4 --store s3://models --root-key root.pem")(revoke)
    app.command(epilog="Example: nestquant keys renew --store s3://models --root-key root.pem")(renew)
    app.command(epilog="Example: nestquant keys show --store s3://models")(show)
    main.add_typer(app, name="keys")
    main.command(
        epilog="Example: nestquant sign resnet18 --version 3 --tag latest=3 --key publisher.pem --key online.pem "
        "--store s3://models"
    )(sign)


def generate(path: Annotated[Path, typer.Argument(metavar="PATH")], *, as_json: Json = False) -> None:
    """Make an Ed25519 key and keep it in a file that only its owner reads."""
    from storage.signing.keys import generate_key

    key = generate_key(path, passphrase=os.environ.get(PASSPHRASE)).public_key
    if as_json:
        print_json({"path": str(path), "keyid": key.keyid})
    else:
        locked = "encrypted" if os.environ.get(PASSPHRASE) else f"not encrypted; set {PASSPHRASE} for that"
        typer.echo(f"{path}: key {key.keyid[:12]} ({locked}).")


def init(
    *,
    store: Store,
    root_key: RootKeys,
    publisher: Annotated[
        list[Path], typer.Option(help="Public half of a key that signs versions and tags. Repeatable.")
    ],
    online: Annotated[list[Path], typer.Option(help="Public half of a key that says what is newest. Repeatable.")],
    out: Annotated[Path, typer.Option(help="Where to write the root, for devices to be given.")],
    threshold: Annotated[int, typer.Option(min=1, help="So many root keys must sign a later root.")] = 1,
) -> None:
    """Begin a store's root of trust."""
    from storage.signing.keys import load_public_key
    from storage.signing.root import create_root
    from storage.stores.uri import open_store

    publishers = [load_public_key(place) for place in publisher]
    onlines = [load_public_key(place) for place in online]
    raw = create_root(
        open_store(store), load_keys(root_key), publishers=publishers, online=onlines, threshold=threshold
    )
    out.write_bytes(raw)
    typer.echo(f"{out}: the root of trust of {store}. Give it to devices: nestquant pull ... --trust {out}")


def add(
    role: Annotated[Role, typer.Argument(metavar="ROLE", help="root, publisher or online")],
    key: Annotated[Path, typer.Argument(metavar="KEY", help="The new key's public half: a .pub file.")],
    *,
    store: Store,
    root_key: RootKeys,
) -> None:
    """Let one more key sign."""
    from storage.signing.keys import load_public_key
    from storage.signing.root import add_key
    from storage.stores.uri import open_existing_store

    public = load_public_key(key)
    add_key(open_existing_store(store), role, public, load_keys(root_key))
    typer.echo(f"Key {public.keyid[:12]} signs as {role} now.")


def rotate(
    keyid: Annotated[str, typer.Argument(metavar="KEYID", help="How the old key's id begins; 'keys show' has it.")],
    key: Annotated[Path, typer.Argument(metavar="NEW", help="The new key's public half: a .pub file.")],
    *,
    store: Store,
    root_key: RootKeys,
) -> None:
    """Put a new key in the place of an old one. What the old one signed no longer counts: sign again."""
    _retire(store, keyid, root_key, key)


def revoke(
    keyid: Annotated[str, typer.Argument(metavar="KEYID", help="The beginning of the key's id; 'keys show' has it.")],
    *,
    store: Store,
    root_key: RootKeys,
) -> None:
    """Take a key out of every role. What it signed no longer counts: sign again."""
    _retire(store, keyid, root_key, None)


def _retire(uri: str, keyid: str, root_key: list[str], replacement: Path | None) -> None:
    from storage.signing.keys import load_public_key
    from storage.signing.root import newest_root, revoke_key
    from storage.stores.uri import open_existing_store

    store = open_existing_store(uri)
    matches = [full for full in newest_root(store).signed.keys if full.startswith(keyid)]
    full = matches[0] if len(matches) == 1 else keyid
    new = None if replacement is None else load_public_key(replacement)
    revoke_key(store, full, load_keys(root_key), replacement=new)
    instead = "" if new is None else f"; {new.keyid[:12]} signs in its place"
    typer.echo(f"Key {full[:12]} is revoked{instead}. Sign every model again: nestquant sign NAME --afresh ...")


def renew(*, store: Store, root_key: RootKeys) -> None:
    """Let the root of trust live another year, with the same keys; also after it has ended."""
    from storage.signing.root import newest_root, renew_root
    from storage.stores.uri import open_existing_store

    target = open_existing_store(store)
    renew_root(target, load_keys(root_key))
    root = newest_root(target).signed
    typer.echo(f"root version {root.version}, valid until {root.expires:%Y-%m-%d}; devices follow by themselves.")


def show(*, store: Store, as_json: Json = False) -> None:
    """Show which keys may sign what, and until when."""
    from storage.signing.expiry import warnings_of
    from storage.signing.root import ROLES, newest_root
    from storage.stores.uri import open_existing_store

    root = newest_root(open_existing_store(store)).signed
    due = warnings_of({"root": root.expires})
    roles = {role: sorted(root.roles[names[0]].keyids) for role, names in ROLES.items()}
    if as_json:
        document = {"version": root.version, "expires": root.expires.isoformat(), "roles": roles}
        print_json(document | {"warnings": list(due)})
        return
    typer.echo(f"root version {root.version}, valid until {root.expires:%Y-%m-%d}")
    for role, keyids in roles.items():
        typer.echo(f"{role}: {', '.join(keyid[:12] for keyid in keyids)}")
    for line in due:
        typer.echo(f"warning: {line}", err=True)


def sign(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    *,
    store: Store,
    key: Keys,
    version: Annotated[list[int] | None, typer.Option("--version", help="Vouch for this version. Repeatable.")] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", metavar="TAG=VERSION", help="Vouch for a tag.")] = None,
    withdraw: Annotated[list[int] | None, typer.Option(help="Take this version back. Repeatable.")] = None,
    afresh: Annotated[bool, typer.Option("--afresh", help="Forget what was signed before (a revoked key).")] = False,
    refresh: Annotated[
        bool,
        typer.Option(
            "--refresh",
            help="Only say again what is newest (online key); with the publisher's key too, renew all that ends soon.",
        ),
    ] = False,
    backwards: Annotated[bool, typer.Option("--backwards", help="Let a tag go back to an earlier version.")] = False,
    as_json: Json = False,
) -> None:
    """Vouch for versions and tags, so that devices with the root of trust believe them."""
    from storage.signing import metadata as signing
    from storage.stores.uri import open_existing_store

    keys, target = load_keys(key), open_existing_store(store)
    if refresh:
        signed = signing.refresh(target, name, keys)
    else:
        tags = dict(_tag(text) for text in tag or ())
        signed = signing.sign(
            target,
            name,
            keys,
            versions=version or (),
            tags=tags,
            withdraw=withdraw or (),
            afresh=afresh,
            backwards="allow" if backwards else "refuse",
        )
    if as_json:
        document: dict[str, Any] = {"name": name, "edition": signed.edition, "versions": signed.versions}
        document |= {"tags": signed.tags, "expires": signed.expires.isoformat(), "warnings": list(signed.warnings)}
        print_json(document)
        return
    tags_told = ", ".join(f"{one} -> {number}" for one, number in sorted(signed.tags.items())) or "no tags"
    typer.echo(
        f"{name}: edition {signed.edition} vouches for versions {', '.join(map(str, signed.versions)) or 'none'} and "
        f"{tags_told}; sign again (--refresh) before {signed.expires:%Y-%m-%d %H:%M} UTC."
    )
    for line in signed.warnings:
        typer.echo(f"warning: {line}", err=True)


def _tag(text: str) -> tuple[str, int]:
    tag, equals, version = text.partition("=")
    if not equals or not version.isdecimal():
        raise typer.BadParameter(f"--tag {text!r}: expected TAG=VERSION, such as latest=3.")
    return tag, int(version)
