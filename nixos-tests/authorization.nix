# Stores of root and of two users.
{
  name = "layered-stores-authorization";

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
      his = {
        lowerStore = "/srv/base";
        owner = "bob";
        root = "/srv/his/root";
        upperLayer = "/srv/his/upper";
        workDir = "/srv/his/work";
      };
    };
  };

  testScript = builtins.readFile ./authorization.py;
}
