#!/bin/sh
# Runs in the new machine's root, once its packages are there: turns a Debian
# into a quick, quiet test machine.
set -eu

# systemd's tools look files up through /proc/self/fd. The mount goes with the
# enclosure that this runs in.
mount -t proc proc /proc

echo machine >/etc/hostname
echo '127.0.0.1 localhost machine' >/etc/hosts
# A machine that knows its id does not take this for a first boot.
systemd-machine-id-setup >/dev/null

for user in alice bob; do
    useradd --create-home --user-group --shell /bin/bash "$user"
done

install -d -m 0755 /nix /nix/store /etc/nix
cat >/etc/nix/nix.conf <<'END'
experimental-features = nix-command local-overlay-store read-only-local-store
sandbox = false
substituters =
build-users-group =
auto-optimise-store = false
END

# The journal lives in memory, and the test's log sees it through the console.
install -d /etc/systemd/journald.conf.d
cat >/etc/systemd/journald.conf.d/machine.conf <<'END'
[Journal]
Storage=volatile
ForwardToConsole=yes
MaxLevelConsole=info
RateLimitIntervalSec=0
END

# A stuck stop job should not hold a test for 90 seconds.
install -d /etc/systemd/system.conf.d
cat >/etc/systemd/system.conf.d/machine.conf <<'END'
[Manager]
DefaultTimeoutStopSec=20s
ShowStatus=no
END

for unit in \
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
    e2scrub_all.timer e2scrub_reap.service fstrim.timer \
    systemd-tmpfiles-clean.timer \
    systemd-networkd.service systemd-networkd.socket \
    systemd-networkd-wait-online.service systemd-resolved.service \
    systemd-timesyncd.service systemd-pstore.service \
    systemd-journal-flush.service systemd-journal-catalog-update.service \
    systemd-hwdb-update.service systemd-update-done.service \
    systemd-firstboot.service systemd-random-seed.service \
    systemd-modules-load.service kmod-static-nodes.service \
    ldconfig.service \
    console-getty.service getty@tty1.service getty-static.service; do
    systemctl mask "$unit" >/dev/null 2>&1
done

rm -rf /usr/share/doc/* /usr/share/man/* /usr/share/locale/* /usr/share/info/*
rm -rf /var/log/journal /var/cache/apt/* /var/lib/apt/lists/*
umount /proc
