# One store, to which things happen.
{
  name = "layered-stores-drift";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.layeredStores.stores.ci = {
      lowerStore = "/srv/base";
      root = "/srv/ci/root";
      upperLayer = "/srv/ci/upper";
      workDir = "/srv/ci/work";
    };
  };

  testScript = builtins.readFile ./drift.py;
}
