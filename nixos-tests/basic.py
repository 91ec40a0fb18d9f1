# A layered store from its declaration to its use: mounted at boot, opened by Nix with its mount
# check on, asked about on the command line and over D-Bus, and back after a reboot with all that
# was built.

import json
import re
import shlex

LOWER = "/srv/lower"
CI = "/var/lib/layered-stores/stores/ci"
# Below which everything is installed.
PREFIX = '"$(dirname "$(dirname "$(readlink -f "$(command -v layered-stores)")")")"'
STORE_INTERFACE = "org.layeredstores1.Store"
MANAGER = "org.layeredstores1 /org/layeredstores1 org.layeredstores1.Manager"


def printed(command: str, pattern: str) -> str:
    """What a command prints once a pattern is in it, for which it does not wait long by itself."""
    found = ""

    def is_in_it(_last: bool) -> bool:
        nonlocal found
        found = machine.succeed(command)
        return re.search(pattern, found) is not None

    retry(is_in_it, 60)
    return found


machine.start(allow_reboot=True)


def status(name: str) -> dict[str, object]:
    """What `layered-stores status` says about a store, problems or not."""
    code, output = machine.execute(f"layered-stores status {name} --json")
    t.assertIn(code, (0, 3))
    found: dict[str, object] = json.loads(output)
    return found


def text(name: str, key: str) -> str:
    """One value of a store's status."""
    return str(status(name)[key])


def store_uri(name: str) -> str:
    """The URL for Nix, quoted for the shell."""
    return shlex.quote(machine.succeed(f"layered-stores uri {name}").strip())


def build(store: str, name: str, script: str) -> str:
    """Builds a derivation whose builder is a shell script, into the store at a (quoted) URL."""
    derivation = (
        f'derivation {{ name = "{name}"; system = builtins.currentSystem; builder = "/bin/sh"; '
        f"args = [ \"-c\" ''{script}'' ]; }}"
    )
    command = f"nix build --impure --no-link --print-out-paths --expr {shlex.quote(derivation)}"
    return machine.succeed(f"{command} --store {store}").strip()


def fingerprint_of_lower() -> str:
    """Every file of the lower store, its time, owner and content, and what its database says."""
    return machine.succeed(
        f"tar --create --sort=name --directory={LOWER}/nix/store . | sha256sum",
        f"nix-store --store {LOWER} --dump-db | sha256sum",
    )


def exit_code(command: str) -> int:
    return machine.execute(command)[0]


with subtest("A store that cannot come up keeps no other down, and says what to do"):
    machine.wait_for_unit("layered-storesd.service")
    machine.wait_for_unit("multi-user.target")
    t.assertEqual(text("host", "state"), "active")

    def says_so(_last: bool) -> bool:
        """Nobody has waited for it, and every few seconds it is tried again."""
        found = status("ci")
        reason = f"{LOWER}/nix/store is not there; fill the lower store"
        return found["state"] == "failed" and reason in str(found["state-reason"])

    retry(says_so, 60)
    machine.fail(f"test -e {CI}/upper")

with subtest("The target of required stores is reached, and does not wait for the others"):
    machine.wait_for_unit("layered-stores.target")

with subtest("Filled and started, it is active"):
    machine.succeed("getent group nixbld || groupadd --system nixbld")
    machine.succeed("mkdir /tmp/greet")
    machine.succeed("printf '#!/bin/sh\\necho hello from below\\n' > /tmp/greet/greet")
    machine.succeed("chmod 755 /tmp/greet/greet; echo 'a line from below' > /tmp/line")
    in_lower = machine.succeed(f"nix-store --store {LOWER} --add /tmp/line").strip()
    built_in_lower = build(LOWER, "below", "echo built below > $out")
    before = fingerprint_of_lower()
    machine.succeed("layered-stores start ci")
    t.assertEqual(text("ci", "state"), "active")
    t.assertEqual(text("ci", "state-reason"), "")
    t.assertEqual(status("ci")["problems"], [])
    machine.require_unit_state("layered-storesd.service")

with subtest("Its mount is a unit of systemd's, under the name the store says"):
    mount_unit = shlex.quote(text("ci", "mount-unit"))
    machine.succeed(f"systemctl is-active {mount_unit}")
    t.assertEqual(
        machine.succeed(f"systemd-escape --path --suffix=mount {CI}/root/nix/store").strip(),
        text("ci", "mount-unit"),
    )
    mounts = machine.succeed(f"findmnt --noheadings --output FSTYPE,OPTIONS {CI}/root/nix/store")
    t.assertEqual(len(mounts.splitlines()), 1)
    for option in ("overlay", "nosuid", "nodev", f"lowerdir={LOWER}/nix/store", f"{CI}/upper"):
        t.assertIn(option, mounts)

with subtest("Directories belong to whom Nix expects"):

    def owner_and_mode(directory: str) -> str:
        return machine.succeed(f"stat --format '%U:%G %a' {directory}").strip()

    t.assertEqual(owner_and_mode(f"{CI}/upper"), "root:nixbld 1775")
    # The upper layer's root is the merged directory's.
    t.assertEqual(owner_and_mode(f"{CI}/root/nix/store"), "root:nixbld 1775")
    t.assertEqual(owner_and_mode(f"{CI}/work"), "root:root 700")
    t.assertEqual(owner_and_mode(f"{CI}/root/nix/var/nix"), "root:nixbld 755")
    t.assertEqual(owner_and_mode(f"{CI}/root"), "root:root 755")

with subtest("Nix builds into it with its mount check on, from what is below"):
    uri = store_uri("ci")
    t.assertNotIn("check-mount", uri)
    built = build(
        uri,
        "above",
        f'file=${{builtins.storePath "{in_lower}"}}; read line < $file; echo "$line, $file" > $out',
    )
    t.assertEqual(machine.succeed(f"cat {CI}/root{built}"), f"a line from below, {in_lower}\n")
    machine.succeed(f"test -e {CI}/upper/{built.removeprefix('/nix/store/')}")
    # Registered with its reference, and what is below is valid here too.
    machine.succeed(f"nix path-info --store {uri} {built} {in_lower} {built_in_lower}")
    t.assertEqual(
        machine.succeed(f"nix-store --store {uri} --query --references {built}").split(), [in_lower]
    )
    machine.succeed(f"nix store verify --no-trust --store {uri} {built} {in_lower}")

with subtest("The lower store is untouched"):
    machine.fail(f"test -e {LOWER}{built}")
    machine.fail(f"nix path-info --store {LOWER} {built}")
    t.assertEqual(fingerprint_of_lower(), before)

with subtest("A build that is in the lower store is not built again"):
    again = build(uri, "below", "echo built below > $out")
    t.assertEqual(again, built_in_lower)
    machine.fail(f"test -e {CI}/upper/{again.removeprefix('/nix/store/')}")

with subtest("The mount check is on: with another mount in its place, Nix refuses"):
    machine.succeed("layered-stores stop ci")
    t.assertEqual(text("ci", "state"), "inactive")
    t.assertEqual(exit_code(f"systemctl is-active {mount_unit}"), 4)
    machine.succeed("mkdir -p /srv/other/{upper,work}")
    other = f"lowerdir={LOWER}/nix/store,upperdir=/srv/other/upper,workdir=/srv/other/work"
    machine.succeed(f"mount -t overlay overlay -o {other} {CI}/root/nix/store")
    said = machine.fail(f"nix path-info --store {uri} {built} 2>&1")
    t.assertIn("overlay filesystem", said)
    machine.succeed(f"umount {CI}/root/nix/store")

with subtest("Unmounted, the mount point refuses writes, from root and from Nix"):
    t.assertIn("i", machine.succeed(f"lsattr -d {CI}/root/nix/store").split()[0])
    machine.fail(f"touch {CI}/root/nix/store/file")
    machine.fail(f"nix path-info --store {uri} {built}")
    t.assertEqual(machine.succeed(f"ls --almost-all {CI}/root/nix/store"), "")
    machine.succeed("layered-stores start ci", f"nix path-info --store {uri} {built}")

with subtest("list and status say at a glance how stores are"):
    t.assertEqual(machine.succeed("layered-stores list"), "ci    active\nhost  active\n")
    # On a slow machine a build has looked for a name before the lower store had it.
    row = rf"(?m)^● ci +active +{LOWER} +2 +(-|.+ ago: reconfigured.*)$"
    table = printed("layered-stores status", row)
    t.assertRegex(table, r"STORE +STATE +LOWER STORE +PATHS +REFRESHED")
    t.assertRegex(table, r"(?m)^● host +active +local +")
    line = r"(?m)layered-storesd\[\d+\]: ci: active, mounted at"
    page = printed("layered-stores status ci", line)
    t.assertRegex(page, r"\A● ci: active for \d+ s\n")
    t.assertRegex(page, r"(?m)^ +2 paths, \d+ KiB; [\d.]+ [GM]iB free$")
    for piece in (f"{LOWER}/nix/store", f"{CI}/upper", "2 paths", f"{CI}/root/nix/store"):
        t.assertIn(piece, page)
    t.assertNotIn("\x1b", table + page, "no colours where nobody sees them")

with subtest("`status --watch` prints a plain page for what has changed, until it is interrupted"):
    machine.succeed(
        "systemd-run --quiet --unit=watch -p RemainAfterExit=yes "
        "-p StandardOutput=truncate:/run/watched -p StandardError=truncate:/run/complained "
        '--setenv=PATH="$PATH" layered-stores status --watch'
    )
    for verb, state in (("start", "active"), ("stop", "inactive"), ("start", "active")):
        machine.succeed(f"layered-stores {verb} host")
        machine.wait_until_succeeds(f"grep host /run/watched | tail -n 1 | grep -w {state}")
    machine.require_unit_state("watch.service")
    t.assertEqual(machine.get_unit_property("watch.service", "SubState"), "running")
    machine.succeed("systemctl kill --signal=INT watch")
    machine.wait_until_succeeds("systemctl show -P SubState watch | grep -v running", timeout=60)
    t.assertEqual(machine.get_unit_property("watch.service", "Result"), "success")
    t.assertEqual(machine.succeed("systemctl stop watch; cat /run/complained"), "")
    pages = machine.succeed("cat /run/watched").removesuffix("\n\n").split("\n\n")
    for page in pages:
        t.assertRegex(page, r"\A +STORE +STATE .*\n. ci +active .*\n. host +(in)?active [^\n]*\Z")
    t.assertTrue(all(one != next_one for one, next_one in zip(pages, pages[1:], strict=False)))

with subtest("The JSON of status is what D-Bus says, key by key"):
    reply = machine.succeed(f"busctl --json=short call {MANAGER} GetStore s ci")
    object_path = json.loads(reply)["data"][0]
    introspected = machine.succeed(
        f"busctl --xml-interface introspect org.layeredstores1 {object_path}"
    )
    names = re.findall(r'<property name="(\w+)"', introspected)
    t.assertIn("RealStoreDir", names)
    got = status("ci")

    def kebab_case(name: str) -> str:
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()

    counted = {"paths", "bytes", "free-bytes", "limit-bytes", "lower-paths"}
    t.assertEqual(set(got), counted | set(map(kebab_case, names)))
    t.assertEqual((got["paths"], got["limit-bytes"]), (2, None))
    assert isinstance(got["bytes"], int) and 0 < got["bytes"] < 100_000, got
    t.assertIn("last-refresh-usec", got)
    for name in set(names) - {"Problems"}:
        value = machine.succeed(
            f"busctl --json=short get-property org.layeredstores1 {object_path} "
            f"{STORE_INTERFACE} {name}"
        )
        t.assertEqual(got[kebab_case(name)], json.loads(value)["data"], name)
    everything = json.loads(machine.succeed("layered-stores status --json"))
    t.assertEqual([store["name"] for store in everything], ["ci", "host"])
    t.assertEqual(sorted(everything[0]), sorted(got))
    listed = json.loads(machine.succeed("layered-stores list --json"))
    t.assertEqual(listed[0], {"name": "ci", "state": "active", "object": object_path})

with subtest("The manager answers everybody who looks"):
    as_alice = "runuser --user alice --"
    for who in ("", as_alice):
        stores = machine.succeed(f"{who} busctl --json=short call {MANAGER} ListStores")
        t.assertEqual(json.loads(stores)["data"][0][0], ["ci", "active", object_path])
        by_path = machine.succeed(
            f"{who} busctl --json=short call {MANAGER} GetStoreByPath s {CI}/root/nix/store"
        )
        t.assertEqual(json.loads(by_path)["data"], [object_path])
        version = machine.succeed(f"{who} busctl get-property {MANAGER} Version")
        t.assertEqual(
            machine.succeed("layered-stores --version").split()[-1], version.split('"')[1]
        )
        t.assertEqual(machine.succeed(f"{who} layered-stores uri ci").strip(), shlex.split(uri)[0])

with subtest("Failures have a name for programs and a sentence for people"):
    for call in ("GetStore s nope", "GetStoreByPath s /nope"):
        said = machine.fail(f"SYSTEMD_LOG_LEVEL=debug busctl call {MANAGER} {call} 2>&1")
        t.assertIn("error-name=org.layeredstores1.Error.NoSuchStore", said)
        t.assertIn("`layered-stores ", said)

with subtest("Exit codes: 0 success, 1 failure, 2 wrong use, 3 there are problems"):
    machine.succeed("printf '[stores.x]\\nlower-store = \"daemon\"\\n' > /tmp/good.toml")
    machine.succeed("printf '[stores.x]\\n' > /tmp/bad.toml")
    for command, code in (
        ("status ci", 0),
        ("check-config /tmp/good.toml", 0),
        ("verify ci", 0),
        ("--help", 0),
        ("status nope", 1),
        ("uri nope", 1),
        ("start nope", 1),
        ("check-config /tmp/bad.toml", 1),
        ("check-config /tmp/missing.toml", 1),
        ("enter nope -- true", 1),
        ("", 2),
        ("status UPPER", 2),
        ("frobnicate", 2),
        ("start", 2),
        ("status --colour ci", 2),
    ):
        t.assertEqual(exit_code(f"layered-stores {command}"), code, command)
    t.assertEqual(
        machine.succeed("layered-stores check-config /tmp/good.toml"),
        "/tmp/good.toml: no mistakes, 1 store\n",
    )
    said = machine.fail("layered-stores check-config /tmp/bad.toml 2>&1")
    t.assertIn('/tmp/bad.toml:1:9: store "x": key "lower-store" is missing', said)
    machine.succeed("mount -t tmpfs none /var/lib/layered-stores/stores/ci/root/nix/store")
    machine.wait_until_succeeds("layered-stores list | grep 'ci *failed'")
    t.assertEqual(exit_code("layered-stores status ci"), 3)
    t.assertEqual(exit_code("layered-stores status"), 3)
    t.assertEqual(exit_code("layered-stores status host"), 0)
    machine.succeed("umount /var/lib/layered-stores/stores/ci/root/nix/store")
    machine.wait_until_succeeds("layered-stores status ci")

with subtest("Programs of a store run in `enter`, for root and for everybody"):
    host = store_uri("host")
    added = machine.succeed(f"nix-store --store {host} --add /tmp/greet").strip()
    script = build(host, "script", "echo echo built above > $out")
    may_enter = exit_code("runuser --user alice -- unshare --user --mount true") == 0
    machine.log(f"unprivileged user namespaces: {may_enter}")
    for who in ("", as_alice) if may_enter else ("",):
        enter = f"{who} layered-stores enter host --"
        t.assertEqual(machine.succeed(f"{enter} {added}/greet"), "hello from below\n")
        t.assertEqual(machine.succeed(f"{enter} /bin/sh {script}"), "built above\n")
        # The user, the exit code, the arguments and the environment are those of the command.
        t.assertEqual(machine.succeed(f"{enter} id -u"), machine.succeed(f"{who} id -u"))
        t.assertEqual(exit_code(f"{enter} /bin/sh -c 'exit 7'"), 7)
        said = machine.succeed(f"{enter} /bin/sh -c 'echo \"$1 $LAYERED_STORE\"' sh 'two  words'")
        t.assertEqual(said, "two  words host\n")
    # Nix in there uses the layered store and not its merged directory.
    machine.succeed(f"layered-stores enter host -- nix path-info {added} {script}")
    # Nothing of it is seen outside.
    machine.fail(f"test -e {added}")
    said = machine.fail("layered-stores enter host -- /nix/store/nope 2>&1")
    t.assertRegex(said, "^layered-stores: cannot run .*/nix/store/nope.*No such file")

with subtest("Manual pages and completions are installed"):

    def installed(file: str) -> str:
        """Where a file is, whose name may have an ending such as .gz; it must be somewhere."""
        find = f"find -L {PREFIX}/share -path '*/{file}*'"
        return machine.succeed(f"{find} | sort | head -n 1 | grep .").strip()

    for page in ("layered-stores.1", "layered-stores-status.1", "layered-stores-check-config.1"):
        installed(f"man1/{page}")
    for page in ("layered-storesd.8", "layered-stores-remount.8"):
        installed(f"man8/{page}")
    for page in ("man1/layered-stores.1", "man5/layered-stores.toml.5"):
        text_of = machine.succeed(f"gzip --decompress --force --stdout {installed(page)}")
        t.assertIn("\n.SH FILES\n", text_of)
        # Not filled, and not obeyed.
        t.assertRegex(text_of, r"(?s)\n\.SH EXAMPLES\n\.nf\n([^.][^\n]*\n|\n)+\.fi\n")
    zsh = installed("zsh/site-functions/_layered-stores")
    fish = installed("fish/vendor_completions.d/layered-stores.fish")
    completion = installed("bash-completion/completions/layered-stores")

    def offered(*words: str) -> list[str]:
        """What bash offers for the last word."""
        typed = " ".join(f"'{word}'" for word in ("layered-stores", *words))
        said = machine.succeed(
            f"""
            set +u; source "{completion}"
            function=$(complete -p layered-stores | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
            COMP_WORDS=({typed}) COMP_CWORD={len(words)}
            $function layered-stores "${{COMP_WORDS[-1]}}" "${{COMP_WORDS[-2]}}"
            echo "${{COMPREPLY[@]}}"
            """
        )
        return sorted(said.split())

    t.assertEqual(offered("sta"), ["start", "status"])
    # Names are offered at once, or not at all where the machine has other things to do.
    retry(lambda _last: offered("status", "") == ["ci", "host"], 60)
    retry(lambda _last: offered("remove-data", "c") == ["ci"], 60)
    # What units and completions run is for nobody to type.
    for hidden in ("nix-daemon", "count", "generate-man", "generate-completions", "store-names"):
        t.assertNotIn(hidden, offered(""))
    machine.fail(f"grep -e generate-man -e generate-completions {zsh} {fish}")
    machine.succeed(f"grep -F '(layered-stores store-names' {fish}", f"grep -F '_names' {zsh}")

with subtest("The journal reads well, and is filtered by store"):
    machine.succeed("journalctl --sync")
    lines = machine.succeed("journalctl --boot --output=cat STORE=ci").splitlines()
    t.assertIn(f"ci: active, mounted at {CI}/root/nix/store", lines)
    t.assertIn("ci: stopped", lines)
    t.assertTrue(all(line.startswith("ci: ") for line in lines), lines)
    everything = machine.succeed("journalctl --boot --output=cat --unit=layered-storesd")
    t.assertIn("host: active, mounted at ", everything)
    t.assertNotIn("\x1b", everything)
    # What went wrong has a warning's priority.
    warnings = machine.succeed("journalctl --boot --output=cat --priority=warning STORE=ci")
    t.assertIn("is not there; fill the lower store", warnings)
    t.assertNotIn("active, mounted", warnings)

with subtest("The unit says how many of all stores are up, and that others are not started"):
    # The required one is up when the daemon is ready.
    machine.succeed("layered-stores stop ci", "systemctl restart layered-storesd")
    t.assertEqual(
        machine.get_unit_property("layered-storesd", "StatusText"),
        "1 of 2 stores active; not started: 1",
    )
    machine.succeed("layered-stores start ci")

with subtest("A reboot brings it all back, with the database intact"):
    database = machine.succeed(f"nix-store --store {uri} --dump-db")
    machine.reboot()
    machine.wait_for_unit("layered-stores.target")
    machine.wait_for_unit("layered-storesd.service")
    machine.succeed("layered-stores status")
    # It is not required, so that nobody has waited for it.
    machine.succeed("layered-stores wait ci --timeout 60")
    machine.succeed(f"systemctl is-active {mount_unit}")
    machine.succeed(f"nix path-info --store {uri} {built} {in_lower}")
    t.assertEqual(machine.succeed(f"nix-store --store {uri} --dump-db"), database)
    t.assertEqual(machine.succeed(f"cat {CI}/root{built}"), f"a line from below, {in_lower}\n")
    t.assertEqual(machine.succeed(f"layered-stores enter host -- {added}/greet")[:5], "hello")
    t.assertEqual(fingerprint_of_lower(), before)

with subtest("With a required store broken the target fails, and nothing else does"):
    machine.succeed("layered-stores stop host ci")
    host_upper = text("host", "upper-layer")
    machine.succeed(f"mv {host_upper} {host_upper}.away; touch {host_upper}")
    machine.reboot()
    machine.wait_for_unit("multi-user.target")
    machine.require_unit_state("layered-storesd.service")
    machine.wait_until_succeeds("systemctl show -P Result layered-stores-wait | grep exit-code")
    machine.require_unit_state("layered-stores.target", "inactive")
    machine.succeed("layered-stores wait ci --timeout 60")

    def host_says_so(_last: bool) -> bool:
        found = status("host")
        return found["state"] == "failed" and "is not a directory" in str(found["state-reason"])

    retry(host_says_so, 60)
    machine.succeed("journalctl --sync")
    said = machine.succeed("journalctl --boot --output=cat --unit=layered-stores-wait")
    t.assertIn("is not a directory", said)

with subtest("Repaired, the target is reached by starting it"):
    machine.succeed(f"rm {host_upper}; mv {host_upper}.away {host_upper}")
    machine.succeed("layered-stores start host", "systemctl start layered-stores.target")
    machine.require_unit_state("layered-stores.target")
    machine.succeed(f"layered-stores enter host -- {added}/greet")
