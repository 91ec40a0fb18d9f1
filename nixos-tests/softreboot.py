# Everything but the kernel is started anew (`systemctl soft-reboot`): stores are unmounted and come
# back. What was in memory is gone, though /run is not.
MERGED = "/srv/ci/root/nix/store"
SCRATCH = "/var/lib/layered-stores/stores/scratch/root/nix/store"
PATH = f"{'0' * 32}-path"

machine.wait_for_unit("layered-storesd.service")
machine.succeed("mkdir -p /srv/base/nix/store", "layered-stores start ci scratch")

for number in (1, 2):
    with subtest(f"After soft reboot {number} all stores are there"):
        # As Nix would leave it, which has a database of what is there.
        machine.succeed(
            f"mkdir -p {MERGED}/{PATH} {SCRATCH}/{PATH} /srv/ci/root/nix/var/nix/db",
            "touch /srv/ci/root/nix/var/nix/db/db.sqlite",
        )
        machine.execute("systemctl soft-reboot", check_return=False)
        machine.wait_until_succeeds(
            f"test $(systemctl show -P SoftRebootsCount) = {number} && "
            "systemctl is-active --quiet layered-storesd && layered-stores status",
            timeout=240,
        )
        machine.succeed(f"test -e {MERGED}/{PATH} && test ! -e {SCRATCH}/{PATH}")

with subtest("What is missing without one is missed"):
    machine.succeed(
        f"systemctl stop layered-storesd && umount {SCRATCH} && umount {SCRATCH.split('/root')[0]}",
        "systemctl start layered-storesd",
    )
    said = machine.fail("layered-stores status scratch")
    t.assertIn("[upper-missing]", said)
