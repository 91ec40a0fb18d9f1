# One store, under which the power is cut.
{
  name = "layered-stores-powercut";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.layeredStores.stores.ci = {
      lowerStore = "/srv/base";
      root = "/srv/ci/root";
      upperLayer = "/srv/ci/upper";
      workDir = "/srv/ci/work";
    };
  };

  testScript = builtins.readFile ./powercut.py;
}
