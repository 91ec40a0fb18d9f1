# What is wrong with the machine rather than with a store: said with the way out, and no more when
# that was gone.
import json
import shlex

MERGED = "/srv/ci/root/nix/store"
BY_HAND = "/srv/hand/root/nix/store"
DROP_IN = "/run/systemd/system/nix-daemon.service.d/private.conf"


def doctor(before: str = "") -> tuple[int, dict[str, dict[str, str]]]:
    """The exit code, and what is not right, by what it is about."""
    status, output = machine.execute(f"{before} layered-stores doctor --json")
    findings = json.loads(output)
    checks = [finding["check"] for finding in findings]
    for check in ("kernel", "overlayfs", "mount(8)", "nix", "nix settings", "stores"):
        assert check in checks, findings
    return status, {it["check"]: it for it in findings if it["verdict"] != "right"}


def is_wrong(check: str, said: str, cure: str, before: str = "") -> None:
    status, found = doctor(before)
    t.assertEqual((status, found[check]["verdict"]), (3, "wrong"), str(found))
    t.assertIn(said, found[check]["message"])
    t.assertIn(cure, found[check]["cure"])


def is_well() -> None:
    status, found = doctor()
    assert status == 0 and all(it["verdict"] == "note" for it in found.values()), found
    # What the newest mount(8) cannot do, and older kernels.
    assert found.keys() <= {"mount(8)", "kernel"}, found


machine.wait_for_unit("multi-user.target")
machine.succeed(
    "nix-store --store /srv/base --init; mkdir -p /srv/base/nix/store",
    "layered-stores reload; layered-stores start ci",
)

with subtest("Where all is well it says so, to everybody"):
    is_well()
    said = machine.succeed("su - alice -c 'layered-stores doctor'")
    t.assertRegex(said, r"(?m)^right +nix +nix \(Nix\) ")
    t.assertRegex(said, r"(?m)^right +stores +1 store, and nothing wrong$")
    assert "\x1b" not in said, said

with subtest("Settings that hurt layered stores are named"):
    for setting, said in (
        ("auto-optimise-store = true", "auto-optimise-store"),
        ("min-free = 1000000", "min-free"),
        ("experimental-features = flakes", "local-overlay-store"),
    ):
        is_wrong("nix settings", said, "", f"NIX_CONFIG={shlex.quote(setting)}")
    is_well()

with subtest("No Nix, and one that is too old"):
    machine.succeed("mkdir -p /tmp/old", "ln -s $(command -v layered-stores) /tmp/old/")
    is_wrong("nix", "there is no `nix`", "2.26 or newer", "PATH=/tmp/old")
    machine.succeed(
        "printf '#!/bin/sh\\necho nix \\\\(Nix\\\\) 2.18.1\\n' >/tmp/old/nix; chmod +x /tmp/old/nix"
    )
    is_wrong("nix", "2.18.1", "2.26 or newer", "PATH=/tmp/old:$PATH")

with subtest("A store that has a problem is named"):
    machine.succeed(f"mount -t tmpfs none {MERGED}")
    machine.wait_until_succeeds(
        "(layered-stores doctor || true) | grep -F 'not all is well with ci'"
    )
    is_wrong("stores", "not all is well with ci", "`layered-stores status ci`")
    machine.succeed(f"umount {MERGED}")
    machine.wait_until_succeeds("layered-stores doctor")
    is_well()

with subtest("An overlay that somebody has made by hand is named, and no other"):
    machine.succeed(
        f"mkdir -p {BY_HAND} /srv/hand/upper /srv/hand/work /srv/other",
        "mount -t overlay overlay -o lowerdir=/srv/base/nix/store,upperdir=/srv/hand/upper,"
        f"workdir=/srv/hand/work {BY_HAND}",
        "mount -t overlay overlay -o lowerdir=/srv/base:/srv/hand /srv/other",
    )
    status, found = doctor()
    t.assertEqual((status, found["mounts"]["verdict"]), (0, "note"))
    t.assertIn(f"{BY_HAND} is an overlay", found["mounts"]["message"])
    machine.succeed(f"umount {BY_HAND} /srv/other")
    is_well()

with subtest("A Nix daemon that goes on seeing old mounts is named"):
    private = "-p PrivateMounts=yes -p MountFlags=private"
    if machine.execute("systemctl cat nix-daemon.service")[0] == 0:
        machine.succeed(
            f"install -D -m 644 /dev/stdin {DROP_IN} "
            "<<'END'\n[Service]\nPrivateMounts=yes\nMountFlags=private\nEND",
            "systemctl daemon-reload; systemctl restart nix-daemon.service",
        )
    else:
        machine.succeed(f"systemd-run --quiet -E PATH --unit=nix-daemon {private} sleep infinity")
    machine.wait_until_succeeds("(layered-stores doctor || true) | grep -F 'an old one of ci'")
    is_wrong("nix-daemon", "an old one of ci", "PrivateMounts=")
    machine.succeed(
        f"systemctl stop nix-daemon.service; rm -f {DROP_IN}; systemctl daemon-reload",
    )
    is_well()
