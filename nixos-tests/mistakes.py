# What does not work is refused before anything is done, as far as a configuration's text shows it:
# in one clear sentence that names the store, the key, the value and the way out, at its place. What
# only the machine shows is the scenario refusals.

import re

LONG = "/" + "a" * 254


def check(text: str) -> list[tuple[int, int, str]]:
    """The mistakes in a configuration's text: line, column, sentence."""
    machine.succeed(f"cat > /tmp/config.toml << 'END'\n{text}\nEND")
    code, said = machine.execute("layered-stores check-config /tmp/config.toml 2>&1")
    t.assertEqual(code, 1, text)
    said = said.removeprefix("layered-stores: ")
    mistakes = []
    for line in said.splitlines():
        found = re.fullmatch(r"/tmp/config\.toml:(\d+):(\d+): (.*)", line)
        assert found is not None, f"a mistake without its place: {line}"
        mistakes.append((int(found[1]), int(found[2]), found[3]))
    return mistakes


def sentences(text: str) -> list[str]:
    return [said for _, _, said in check(text)]


def refused(line: str, sentence: str, before: str = 'lower-store = "/l"') -> None:
    """A line in a store's table, and what is said about it, at the place of its value."""
    text = f"[stores.ci]\n{before}\n{line}" if before else f"[stores.ci]\n{line}"
    [(number, column, said)] = check(text)
    key, _, value = line.partition(" = ")
    t.assertEqual(said, f'store "ci": {key} = {value}: {sentence}', line)
    t.assertEqual((number, column), (text.count("\n") + 1, len(key) + 4), line)


with subtest("Paths that the kernel, systemd and Nix would read differently are refused"):
    characters = "only letters, digits, '/', '.', '_' and '-' are safe in mount options"
    for path, sentence in {
        "upper": "the path is relative; give an absolute path",
        "./upper": "the path is relative; give an absolute path",
        "": "the path is empty; give an absolute path",
        "/a/../b": 'the path holds ".." as a component; write the path without it',
        "/a/./b": 'the path holds "." as a component; write the path without it',
        "/a//b": 'the path holds "" as a component; write the path without it',
        "/a/": "the path ends in '/'; leave the last '/' away",
        "/a b": f"the path holds ' '; {characters}",
        "/a,b": f"the path holds ','; {characters}",
        "/a:b": f"the path holds ':'; {characters}",
        "/a%b": f"the path holds '%'; {characters}",
        "/ä": f"the path holds 'ä'; {characters}",
        "/": "the root directory cannot be used here; give a directory of its own",
        LONG: "the path is 255 bytes long; the kernel takes at most 254",
    }.items():
        for key in ("root", "upper-layer", "work-dir"):
            refused(f'{key} = "{path}"', sentence)
        if path not in ("", "upper", "/"):
            refused(f'lower-store = "{path}"', sentence, before="")

with subtest("A root that leaves no room for what is below it is refused"):
    [said] = sentences(f'[stores.ci]\nlower-store = "/l"\nroot = "{LONG[:250]}"')
    t.assertIn("with nix/store below it: the path is 260 bytes long", said)
    [said] = sentences(f'[stores.ci]\nlower-store = "/l"\nroot = "/{"-" * 100}"')
    t.assertIn("and systemd takes 255; use a shorter path", said)

with subtest("Lower stores that have no directory here are refused"):
    way_out = 'an overlay needs one: use a root directory, "daemon", "local" or "layered:NAME"'
    for url in ("ssh://host", "ssh-ng://host", "https://cache.example.org", "s3://b", "dummy://"):
        scheme = url.partition(":")[0]
        sentence = f'a "{scheme}" store has no directory on this machine; {way_out}'
        refused(f'lower-store = "{url}"', sentence, before="")
    for value, sentence in {
        "": 'it is empty; name a root directory, a Nix store URL such as "daemon", '
        'or "layered:NAME"',
        "/": 'the host\'s own store is written "daemon" (through its daemon) or "local" (directly)',
        "local?root=relative": "the path is relative; give an absolute path",
        "local?store=/gnu/store": 'its store directory is "/gnu/store"; a layered store needs one '
        'that is "/nix/store"',
        "layered:UP": "what follows \"layered:\" is no store's name: the name holds 'U'; "
        "use lower-case letters, digits and '-' only",
        "layered:no": 'no store "no" is declared here; declare it, or name another',
        "layered:ci": "the store lies on itself (ci on ci); let one of them have a lower store of "
        "its own",
    }.items():
        refused(f'lower-store = "{value}"', sentence, before="")
    t.assertEqual(
        check("[stores.ci]"),
        [
            (
                1,
                9,
                'store "ci": key "lower-store" is missing; name the store underneath, '
                'for example "daemon"',
            )
        ],
    )

with subtest("What would end a line of a file, or be obeyed by a terminal, is refused"):
    way_out = "as it is or percent-encoded, which no store's URL has to; take it away"
    for written, character in {
        r"local?root=/l&log=\u0000": r"\0",
        "local?root=/l&log=/x%00": r"\0",
        r"daemon?\nstore=x": r"\n",
        r"daemon?log=\u001b[2J": r"\u{1b}",
        "unix:///run/%1b[2J": r"\u{1b}",
        "daemon?log=%ff": "\ufffd",
    }.items():
        [said] = sentences(f'[stores.ci]\nlower-store = "{written}"')
        t.assertIn(f": it holds '{character}', {way_out}", said)
    for key in ("root", "owner", "daemon.socket-path"):
        [said] = sentences(f'[stores.ci]\nlower-store = "/l"\n{key} = "/a\\u001b[2Jb"')
        t.assertIn(rf'store "ci": {key} = "/a\u{{1b}}[2Jb": ', said)
    for value, sentence in {
        r"a\u0000b": "the value holds a control character; take it away",
        r"\u001b[2J": "the value holds a control character; take it away",
        r"a\rstore = x": "the value holds a control character; take it away",
        r"a\nstore = x": "the value has to be one line; take the line break away",
    }.items():
        [said] = sentences(
            f'[stores.ci]\nlower-store = "/l"\ndaemon.settings.substituters = "{value}"'
        )
        t.assertEqual(said, f'store "ci": daemon.settings.substituters: {sentence}')
    [said] = sentences('[stores.ci]\nlower-store = "/l"\ndaemon.settings."\\u001b[2J" = "a"')
    t.assertTrue(said.startswith(r'store "ci": daemon.settings.\u{1b}[2J: the name of'), said)

with subtest("Stacks deeper than the kernel takes, and loops, are refused"):
    stack = "".join(
        f'[stores.{name}]\nlower-store = "{lower}"\n'
        for name, lower in (("a", "/l"), ("b", "layered:a"), ("c", "layered:b"))
    )
    [(line, column, said)] = check(stack)
    t.assertEqual((line, column), (6, 15))
    t.assertEqual(
        said,
        'store "c": lower-store = "layered:b": the kernel stacks at most 2 overlays and this would '
        "be number 3 (c on b on a); use the lower store of b instead",
    )
    loop = '[stores.a]\nlower-store = "layered:b"\n[stores.b]\nlower-store = "layered:a"'
    t.assertEqual([said.count("lies on itself") for said in sentences(loop)], [1, 1])

with subtest("No directory serves twice, or lies inside another"):
    first = '[stores.a]\nlower-store = "/l"\nroot = "/a/root"\nupper-layer = "/a/up"\n'
    first += 'work-dir = "/a/work"\n'
    own = {"root": "/b/root", "upper-layer": "/b/up", "work-dir": "/b/work"}
    each = "give each a directory of its own"
    for key, value, sentence in (
        ("upper-layer", "/a/up", f'it is also the upper-layer of store "a" (/a/up); {each}'),
        ("work-dir", "/a/work", f'it is also the work-dir of store "a" (/a/work); {each}'),
        ("root", "/a/root", f'it is also the root of store "a" (/a/root); {each}'),
        ("root", "/a/up", f'it is also the upper-layer of store "a" (/a/up); {each}'),
        ("upper-layer", "/a/up/x", f'it lies inside the upper-layer of store "a" (/a/up); {each}'),
        ("root", "/a/work/x", f'it lies inside the work-dir of store "a" (/a/work); {each}'),
        ("work-dir", "/b/up", f"it is also the upper-layer of the same store (/b/up); {each}"),
        (
            "work-dir",
            "/b/up/work",
            f"it lies inside the upper-layer of the same store (/b/up); {each}",
        ),
        (
            "upper-layer",
            "/l/nix/store/up",
            'it lies inside the lower store\'s directory of store "a" (/l/nix/store); ' + each,
        ),
        (
            "lower-store",
            "/a/root",
            'this is the store "a" of this configuration; write "layered:a"',
        ),
        (
            "lower-store",
            "/b/up",
            "the lower store's directory /b/up/nix/store lies inside the upper-layer of the same "
            "store (/b/up); a lower store has to lie apart",
        ),
    ):
        keys = {"lower-store": "/l", **own, key: value}
        table = "".join(f'{name} = "{path}"\n' for name, path in keys.items())
        text = f"{first}[stores.b]\n{table}"
        t.assertEqual(sentences(text), [f'store "b": {key} = "{value}": {sentence}'])

with subtest("Names, accounts, modes and types are checked"):
    for name, sentence in {
        '"CI"': "the name holds 'C'; use lower-case letters, digits and '-' only",
        "a_b": "the name holds '_'; use lower-case letters, digits and '-' only",
        "-a": "the name starts with '-'; start it with a lower-case letter or a digit",
        '""': "a store's name is empty; use lower-case letters, digits and '-'",
        "a" * 65: "the name is 65 bytes long; the most is 64",
    }.items():
        plain = name.strip('"')
        text = f'[stores.{name}]\nlower-store = "/l"'
        t.assertEqual(check(text), [(1, 9, f'store "{plain}": {sentence}')])
    octal = "a mode is three or four octal digits that leave the owner all rights, such as"
    refused('mode = "0777"', "everybody could write into the store; take the last digit's 2 away")
    for mode in ("rwx", "0055", "0o755", "17755"):
        refused(f'mode = "{mode}"', f'{octal} "1775"')
    for account in ("", "a b", "-x"):
        refused(f'owner = "{account}"', "not the name or number of an account")
        refused(f'group = "{account}"', "not the name or number of an account")
    for declared, sentence in {
        "root = 1": 'root: a string is expected here, not an integer; write "1"',
        "lower-store = []": "lower-store: a string is expected here, not an array",
        'required = "yes"': "required: true or false is expected here, not a string",
        "autostart = 1": "autostart: true or false is expected here, not an integer",
        "mode = 755": 'mode: a string is expected here, not an integer; write "755"',
    }.items():
        before = [] if declared.startswith("lower") else ['lower-store = "/l"']
        text = "\n".join(["[stores.ci]", *before, declared])
        t.assertEqual(sentences(text), [f'store "ci": {sentence}'])

with subtest("Unknown keys are refused, and the nearest valid one is named"):
    for text, place, sentence in (
        ("[stors.ci]", (1, 2), 'unknown key "stors"; did you mean "stores"?'),
        ("zzz = 1", (1, 1), 'unknown key "zzz"; the keys are stores'),
        (
            '[stores.ci]\nlower-store = "/l"\nuper-layer = "/u"',
            (3, 1),
            'store "ci": unknown key "uper-layer"; did you mean "upper-layer"?',
        ),
        (
            '[stores.ci]\nlower-store = "/l"\nquota = 1',
            (3, 1),
            'store "ci": unknown key "quota"; the keys are lower-store, root, upper-layer, '
            "work-dir, owner, group, mode, required, autostart, leases, mount-options, "
            "ephemeral-size, daemon",
        ),
    ):
        t.assertEqual(check(text), [(*place, sentence)])
    for text in (
        "[stores.ci",
        "[stores.ci]\nlower-store = /l",
        "[stores.ci]\n[stores.ci]",
        "stores = 1",
    ):
        t.assertEqual(len(check(text)), 1)

with subtest("All mistakes are named at once, in the order of the text"):
    mistakes = check('[stores.b]\nroot = 1\n[stores.a]\nlower-store = "/l"\nworkdir = "/w"')
    t.assertEqual([line for line, _, _ in mistakes], [1, 2, 5])
