# Eleven stores, of which one has its lower store on a filesystem that hangs, one lies on that, and
# one has an owner whom only a name service knows.
{ lib, pkgs, ... }:
let
  others = lib.genAttrs (map (number: "other-${toString number}") (lib.range 1 8)) (name: {
    lowerStore = "/srv/base";
    root = "/srv/${name}/root";
    upperLayer = "/srv/${name}/upper";
    workDir = "/srv/${name}/work";
  });
in
{
  name = "layered-stores-hang";

  nodes.machine = {
    imports = [ ./machine.nix ];

    # nss-systemd, for when nscd is not waited for any longer.
    systemd.services.layered-storesd.environment.LD_LIBRARY_PATH = lib.makeLibraryPath [
      pkgs.systemd
    ];

    # Their lower stores are filled by the scenario, so nothing is there at boot.
    services.layeredStores.stores = others // {
      above = {
        lowerStore = "layered:hung";
        root = "/srv/above/root";
        upperLayer = "/srv/above/upper";
        workDir = "/srv/above/work";
      };
      hung = {
        lowerStore = "/srv/fuse";
        root = "/srv/hung/root";
        upperLayer = "/srv/hung/upper";
        workDir = "/srv/hung/work";
      };
    };
    # The option would say that there is no such user in this configuration.
    services.layeredStores.settings.stores.ghosts = {
      lower-store = "/srv/base";
      root = "/srv/ghosts/root";
      upper-layer = "/srv/ghosts/upper";
      work-dir = "/srv/ghosts/work";
      owner = "ghost";
    };
  };

  testScript = builtins.readFile ./hang.py;
}
