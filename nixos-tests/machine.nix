# The virtual machine of every scenario, as like the Debian of driver/provision.sh as NixOS gets.
{ lib, pkgs, ... }:
{
  imports = [ ../module ];

  services.layeredStores.enable = true;

  # A writable store that survives a reboot, and room for what is built.
  virtualisation = {
    memorySize = 2048;
    diskSize = 4096;
    writableStore = true;
    writableStoreUseTmpfs = false;
  };

  users.users = lib.genAttrs [ "alice" "bob" ] (_name: {
    isNormalUser = true;
  });

  nix.settings = {
    # For scenarios that open a store directly. Users of a store's Nix daemon need none of it.
    experimental-features = [
      "nix-command"
      "local-overlay-store"
      "read-only-local-store"
    ];
    sandbox = false;
    substituters = lib.mkForce [ ];
    auto-optimise-store = false;
  };

  # What the scripts use beside what every NixOS has.
  environment.systemPackages = [
    pkgs.acl
    pkgs.attr
    pkgs.dbus
    pkgs.e2fsprogs
    pkgs.jq
    pkgs.psmisc
    pkgs.python3
    pkgs.strace
  ];
}
