# A store of root's and one of a user's, under attack by users.
{
  name = "layered-stores-trust";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.layeredStores.stores = {
      ci = {
        lowerStore = "/srv/base";
        root = "/srv/ci/root";
        upperLayer = "/srv/ci/upper";
        workDir = "/srv/ci/work";
      };
      hers = {
        lowerStore = "/srv/base";
        owner = "alice";
        root = "/srv/hers/root";
        upperLayer = "/srv/hers/upper";
        workDir = "/srv/hers/work";
      };
    };
  };

  testScript = builtins.readFile ./trust.py;
}
