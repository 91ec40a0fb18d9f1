# One store, which the daemon is killed about.
{
  name = "layered-stores-killpoints";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.layeredStores.stores.ci = {
      lowerStore = "/srv/base";
      root = "/srv/ci/root";
      upperLayer = "/srv/ci/upper";
      workDir = "/srv/ci/work";
    };
  };

  testScript = builtins.readFile ./killpoints.py;
}
