# The NixOS module where there is no NixOS: evaluated by the machine's own Nix with Nixpkgs, and
# what it renders is linted, compared with what the daemon says, and booted.

import json
import re
from pathlib import Path
from typing import Any

from driver import nixpkgs, paths

PROJECT = "/srv/project"
REFERENCE = paths.REPOSITORY / "docs" / "options.md"
UNITS = "/etc/systemd/system"
NIX_BLOCK = re.compile(r"^```nix\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def evaluate(attribute: str) -> Any:
    """What an attribute of nixos-tests/eval is."""
    output = machine.succeed(
        f"NIXPKGS={PROJECT}/nixpkgs nix-instantiate --eval --strict --json --readonly-mode "
        f"{PROJECT}/nixos-tests/eval -A {attribute}",
        timeout=600,
    )
    return json.loads(output)


def write(path: str, text: str) -> None:
    machine.succeed(f"install -D -m 644 /dev/stdin '{path}' <<'END-OF-FILE'\n{text}\nEND-OF-FILE")


def status(name: str) -> dict[str, Any]:
    _, output = machine.execute(f"layered-stores status {name} --json")
    found: dict[str, Any] = json.loads(output)
    return found


machine.start(allow_reboot=True)
nixpkgs.copy_to(machine, f"{PROJECT}/nixpkgs")
nixpkgs.copy_project_to(machine, PROJECT)

with subtest("Scenarios, values, units, documentation and refusals are as they should be"):
    report = evaluate("report")
    for failure in report["failures"]:
        log.tell(json.dumps(failure, indent=2, ensure_ascii=False))
    t.assertEqual(report["failures"], [])
    log.tell(f"{report['tests']} tests, by NixOS {report['nixos']}")
    t.assertGreater(report["tests"], 150)

with subtest("The reference of all options is the committed one"):
    reference = evaluate("optionReference")
    t.assertIn("## `services.layeredStores.stores.<name>.lowerStore`", reference)
    if REFERENCE.exists() and REFERENCE.read_text() != reference:
        machine.out_dir.mkdir(parents=True, exist_ok=True)
        (machine.out_dir / REFERENCE.name).write_text(reference)
        made = (machine.out_dir / REFERENCE.name).relative_to(paths.REPOSITORY)
        raise AssertionError(f"docs/{REFERENCE.name} is not what the options say: copy {made}")

with subtest("Every configuration in the documents is one that NixOS takes without a word"):
    snippets: dict[str, str] = {}
    for page in (paths.REPOSITORY / "README.md", *paths.REPOSITORY.glob("docs/*.md")):
        for number, block in enumerate(NIX_BLOCK.findall(page.read_text())):
            if "services.layeredStores = {" in block:
                # The README leaves the braces of a module away.
                bare = block.startswith("services.")
                snippets[f"{page.stem}-{number}"] = f"{{\n{block}}}\n" if bare else block
    t.assertGreater(len(snippets), 5)
    for name, text in snippets.items():
        write(f"{PROJECT}/snippets/{name}.nix", text)
    files = " ".join(f"{PROJECT}/snippets/{name}.nix" for name in snippets)
    output = machine.succeed(
        f"NIXPKGS={PROJECT}/nixpkgs nix-instantiate --eval --strict --json --readonly-mode "
        f"--expr '(import {PROJECT}/nixos-tests/eval {{ }}).complaints [ {files} ]'",
        timeout=600,
    )
    complaints = dict(zip(snippets, json.loads(output), strict=True))
    t.assertEqual({name: said for name, said in complaints.items() if said}, {})

with subtest("What types and assertions do not refuse, the build does, and names the options"):
    refused = evaluate("machine.refused")
    t.assertGreater(len(refused), 80)
    check = "layered-stores check-config --nixos-options /tmp/refused.toml"
    for name, refusal in refused.items():
        write("/tmp/refused.toml", refusal["toml"])
        code, said = machine.execute(f"{check} 2>&1")
        t.assertEqual(code, 1, f"{name}: nothing refuses this:\n{refusal['toml']}")
        sentences = [line.partition(": ")[2] for line in said.splitlines()]
        t.assertEqual(sentences, refusal["build"], name)

booted = evaluate("machine.booted")

with subtest("What the module takes, the daemon takes"):
    write("/etc/layered-stores/config.toml", booted["toml"])
    machine.succeed("layered-stores check-config")

with subtest("systemd has nothing to say against its units"):
    for name, text in booted["units"].items():
        write(f"{UNITS}/{name}", text)
    for link in booted["wants"]:
        unit = Path(link).name
        target = f"{UNITS}/{unit}" if unit in booted["units"] else f"/usr/lib/systemd/system/{unit}"
        machine.succeed(f"mkdir -p {UNITS}/{Path(link).parent}", f"ln -s {target} {UNITS}/{link}")
    names = {name.removesuffix(".d/overrides.conf") for name in booted["units"]}
    # A template is looked at through an instance.
    names = {name.replace("@.", "@ci.") for name in names}
    said = machine.succeed(
        "systemctl daemon-reload",
        # The image has no manual pages.
        f"systemd-analyze verify --man=no --recursive-errors=no {' '.join(sorted(names))} 2>&1",
    )
    t.assertEqual(said, "")

# What polkit thinks of its rules shows in what it allows, below.
write("/etc/polkit-1/rules.d/10-nixos.rules", booted["polkit"])

# What systemd-tmpfiles makes of the module's rule.
machine.succeed("mkdir /var/lib/figures")

# One of the stores lies on a filesystem that nothing else waits for.
machine.succeed("mkdir /data", "echo 'tmpfs /data tmpfs noauto,mode=0755 0 0' >>/etc/fstab")

with subtest("Booted with all of that, stores are up and the target is reached"):
    machine.reboot()
    machine.wait_for_unit("layered-stores.target")
    machine.wait_for_unit("layered-stores-filesystems-data.target")
    machine.succeed("layered-stores status")
    for name in booted["uris"]:
        t.assertEqual((status(name)["state"], status(name)["problems"]), ("active", []), name)
    t.assertEqual(machine.succeed("journalctl -b -u polkit -p err -q -o cat"), "")

with subtest("The filesystem of a store was mounted before anything was made on it"):
    t.assertEqual(machine.succeed("findmnt --noheadings --output FSTYPE /data").strip(), "tmpfs")
    machine.succeed("test -d /data/upper", "mkdir /tmp/below; mount --bind / /tmp/below")
    t.assertEqual(machine.succeed("ls -A /tmp/below/data", "umount /tmp/below"), "")

with subtest("Each has the URL that the module says it has"):
    for name, uri in booted["uris"].items():
        t.assertEqual(machine.succeed(f"layered-stores uri {name}").strip(), uri)

with subtest("Drop-ins are in force"):
    drop_ins = machine.get_unit_property("layered-storesd.service", "DropInPaths")
    t.assertEqual(drop_ins, f"{UNITS}/layered-storesd.service.d/overrides.conf")
    after = machine.get_unit_property("layered-storesd.service", "After").split()
    t.assertIn("layered-stores-filesystems-data.target", after)
    limit = machine.get_unit_property("layered-stores-nix-daemon@ci.service", "MemoryMax")
    t.assertEqual(limit, str(1024**3))
    t.assertIn(
        "CURL_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt",
        machine.get_unit_property("layered-stores-nix-daemon@ci.service", "Environment"),
    )

with subtest("Figures are written where the option says, and told over the socket"):
    machine.wait_until_succeeds(
        'grep -F \'store_state{store="ci",state="active"} 1\' /var/lib/figures/layered-stores.prom',
        timeout=60,
    )
    t.assertEqual(machine.succeed("ls -A /var/lib/figures"), "layered-stores.prom\n")
    machine.succeed("test -S /run/layered-stores-metrics.sock")

with subtest("Garbage is collected when it is to be, with what was said about it"):
    machine.require_unit_state("layered-stores-gc-plain.timer")
    due = machine.succeed("systemctl show -P TimersCalendar layered-stores-gc-plain.timer")
    times = re.findall(r"OnCalendar=(.*?) ;", due)
    t.assertEqual(sorted(times), ["Mon *-*-* 04:00:00", "Thu *-*-* 05:00:00"])
    machine.succeed("systemctl start layered-stores-gc@plain.service", timeout=120)
    # Names with a backslash are escaped there once more, and quoted.
    ordered = machine.get_unit_property("layered-stores-gc@plain.service", "After")
    t.assertIn(status("plain")["mount-unit"], ordered.replace("\\\\", "\\"))
    said = machine.succeed("journalctl --sync", "journalctl -q -o cat -u layered-stores-gc@plain")
    t.assertRegex(said, "(?m)^plain: 0 paths deleted, 0 B freed; .* free$")

with subtest("Whom remountUsers names may have that store remounted, and nobody else any"):
    machine.succeed("runuser -u alice -- layered-stores remount ci")
    machine.fail("runuser -u alice -- layered-stores remount plain")
    machine.fail("runuser -u bob -- layered-stores remount ci")

with subtest("The next reload finds nothing to do"):
    before = machine.succeed("findmnt --noheadings --output ID,TARGET --types overlay")
    machine.succeed("layered-stores reload")
    t.assertEqual(
        machine.succeed("findmnt --noheadings --output ID,TARGET --types overlay"), before
    )
