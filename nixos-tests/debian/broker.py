# Makes dbus-broker the machine's bus, as `services.dbus.implementation` does on NixOS.

machine.start(allow_reboot=True)
machine.succeed(
    "dpkg --install /var/cache/packages/dbus-broker_*.deb", "systemctl enable dbus-broker.service"
)
machine.reboot()
