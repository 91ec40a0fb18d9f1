# A store whose paths are looked at for long.
{
  name = "layered-stores-jobs";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.layeredStores.stores.ci = {
      lowerStore = "/srv/base";
      root = "/srv/ci/root";
      upperLayer = "/srv/ci/upper";
      workDir = "/srv/ci/work";
    };
  };

  testScript = builtins.readFile ./jobs.py;
}
