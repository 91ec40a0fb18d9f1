# One store in which others are busy. Its lower store is filled by the scenario.
{
  name = "layered-stores-gapless";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.layeredStores.stores.ci = {
      lowerStore = "/srv/lower";
      root = "/srv/ci/root";
      upperLayer = "/srv/ci/upper";
      workDir = "/srv/ci/work";
      required = false;
    };
  };

  testScript = builtins.readFile ./gapless.py;
}
