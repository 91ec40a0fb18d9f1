# One store that has its directories elsewhere, and one that has them in the state directory.
{
  name = "layered-stores-scarce";

  nodes.machine = {
    imports = [ ./machine.nix ];

    # Their lower store is filled by the scenario, so nothing is there at boot.
    services.layeredStores.stores = {
      ci = {
        lowerStore = "/srv/base";
        root = "/srv/ci/root";
        upperLayer = "/srv/ci/upper";
        workDir = "/srv/ci/work";
      };
      own.lowerStore = "/srv/base";
    };
  };

  testScript = builtins.readFile ./scarce.py;
}
