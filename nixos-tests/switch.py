# `nixos-rebuild switch` from one configuration to another: the daemon does what has changed, and
# nobody else notices. On a Debian NixOS' own program for it runs, on what debian/switch.py makes of
# the same configurations.

import json
import shlex

STORES = "/var/lib/layered-stores/stores"
ALL = ["changed", "doomed", "kept", "served"]


def switch(name: str = "") -> None:
    """Makes a specialisation the running system, or the one without any."""
    specialisation = f"/specialisation/{name}" if name else ""
    machine.succeed(f"/run/booted-system{specialisation}/bin/switch-to-configuration test 2>&1")


def states() -> dict[str, str]:
    listed = json.loads(machine.succeed("layered-stores list --json"))
    return {row["name"]: row["state"] for row in listed}


def mount(name: str) -> str:
    """Differs once a store was unmounted, however briefly."""
    directory = f"{STORES}/{name}/root/nix/store"
    return machine.succeed(
        # The kernel gives the numbers of what has gone to what comes next.
        f"systemctl show -P ActiveEnterTimestampMonotonic $(systemd-escape -p {directory}).mount",
        f"findmnt --noheadings --output ID,MAJ:MIN {directory}",
    )


def mounts(*names: str) -> dict[str, str]:
    return {name: mount(name) for name in names}


def invocation(unit: str) -> str:
    """Differs once a unit was started anew."""
    return machine.get_unit_property(unit, "InvocationID")


def main_pid(unit: str) -> str:
    return machine.get_unit_property(unit, "MainPID")


def ask_nix_daemon(name: str) -> None:
    """Has the store's Nix daemon answer, which starts it."""
    store = f"unix:///run/layered-stores/{name}/daemon.sock"
    machine.succeed(f"runuser -u alice -- nix store info --store {shlex.quote(store)}")


def run() -> None:
    daemon = "layered-storesd.service"
    nix_daemon = "layered-stores-nix-daemon@served.service"
    machine.wait_for_unit("layered-stores.target")
    t.assertEqual(states(), dict.fromkeys(ALL, "active"))
    ask_nix_daemon("served")
    ask_nix_daemon("doomed")
    target = invocation("layered-stores.target")

    with subtest("An unchanged configuration changes nothing"):
        before = mounts(*ALL)
        pids = main_pid(daemon), main_pid(nix_daemon)
        lines = f"journalctl --sync; journalctl -b -u {daemon}"
        reloads = machine.succeed(f"{lines} | grep -c Reload || true")
        switch("unrelated")
        t.assertEqual(mounts(*ALL), before)
        t.assertEqual((main_pid(daemon), main_pid(nix_daemon)), pids)
        t.assertEqual(machine.succeed(f"{lines} | grep -c Reload || true"), reloads)

    with subtest("A changed store is taken down and brought up, and no other"):
        switch("changed")
        machine.succeed(f"test -d {STORES}/changed/other")
        t.assertEqual(states(), dict.fromkeys(ALL, "active"))
        after = mounts(*ALL)
        t.assertNotEqual(after.pop("changed"), before.pop("changed"))
        t.assertEqual(after, before)
        t.assertEqual((main_pid(daemon), main_pid(nix_daemon)), pids)
        switch()

    with subtest("A new store is brought up"):
        before = mounts(*ALL)
        switch("added")
        t.assertEqual(states(), dict.fromkeys([*ALL, "added"], "active"))
        t.assertEqual(mounts(*ALL), before)
        t.assertEqual((main_pid(daemon), main_pid(nix_daemon)), pids)
        machine.succeed(f"touch {STORES}/added/root/nix/store/data")
        switch()
        t.assertEqual(states(), dict.fromkeys(ALL, "active"))
        machine.succeed(f"test -e {STORES}/added/upper/data")

    with subtest("A store that is gone is taken down with its Nix daemon, and its data stays"):
        # As at boot.
        machine.succeed("systemctl start layered-stores-gc-doomed.timer")
        machine.succeed(f"touch {STORES}/doomed/root/nix/store/data")
        switch("removed")
        t.assertEqual(sorted(states()), ["changed", "kept", "served"])
        machine.succeed(f"test -e {STORES}/doomed/upper/data")
        machine.fail(f"mountpoint --quiet {STORES}/doomed/root/nix/store")
        machine.fail("test -e /run/layered-stores/doomed/daemon.sock")
        machine.fail("systemctl is-active layered-stores-nix-daemon@doomed.service")
        machine.fail("systemctl is-active layered-stores-gc-doomed.timer")
        t.assertEqual((main_pid(daemon), main_pid(nix_daemon)), pids)
        switch()
        machine.succeed(f"test -e {STORES}/doomed/root/nix/store/data")

    with subtest("Other limits restart that one Nix daemon and nothing else"):
        before = mounts(*ALL)
        switch("limited")
        t.assertEqual(machine.get_unit_property(nix_daemon, "MemoryMax"), str(1024**3))
        t.assertNotEqual(main_pid(nix_daemon), pids[1])
        t.assertEqual(main_pid(daemon), pids[0])
        t.assertEqual(mounts(*ALL), before)
        ask_nix_daemon("served")
        switch()

    with subtest("Whom a Nix daemon lets in is a matter of its next connection"):
        before = mounts(*ALL)
        ask = "nix store info --store unix:///run/layered-stores/served/daemon.sock"
        machine.fail(f"runuser -u bob -- {ask}")
        switch("opened")
        machine.succeed(f"runuser -u bob -- {ask}")
        t.assertEqual(main_pid(daemon), pids[0])
        t.assertEqual(mounts(*ALL), before)
        ask_nix_daemon("served")
        switch()
        machine.fail(f"runuser -u bob -- {ask}")
        ask_nix_daemon("served")

    with subtest("What holds for every Nix daemon restarts those of stores, and nothing else"):
        for name, holds in [
            ("tuned", "grep -q max-silent-time.=.3600 /etc/nix/nix.conf"),
            ("proxied", f"systemctl show -P Environment {nix_daemon} | grep proxy.example:3128"),
            ("nicer", f"systemctl show -P Nice {nix_daemon} | grep -x 5"),
        ]:
            before = mounts(*ALL)
            nix_pid = main_pid(nix_daemon)
            switch(name)
            machine.succeed(holds)
            t.assertNotIn(main_pid(nix_daemon), ("0", nix_pid), name)
            t.assertEqual(main_pid(daemon), pids[0], name)
            t.assertEqual(mounts(*ALL), before, name)
            ask_nix_daemon("served")
            switch()

    with subtest("Another version takes over all mounts"):
        before = mounts(*ALL)
        pid = main_pid(daemon)
        switch("upgraded")
        t.assertNotEqual(main_pid(daemon), pid)
        t.assertEqual(mounts(*ALL), before)
        t.assertEqual(states(), dict.fromkeys(ALL, "active"))
        machine.succeed("layered-stores status")
        ask_nix_daemon("served")

    with subtest("Whoever needs the stores was never stopped"):
        t.assertEqual(invocation("layered-stores.target"), target)


run()
