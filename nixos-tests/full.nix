# One store, whose upper layer gets a filesystem of its own, which turns read-only and is filled.
{
  name = "layered-stores-full";

  nodes.machine = {
    imports = [ ./machine.nix ];

    # The filesystem is made by the scenario, so nothing is there at boot.
    services.layeredStores.stores.ci = {
      lowerStore = "/srv/base";
      root = "/srv/ci/root";
      upperLayer = "/srv/disk/ci/upper";
      workDir = "/srv/disk/ci/work";
    };
  };

  testScript = builtins.readFile ./full.py;
}
