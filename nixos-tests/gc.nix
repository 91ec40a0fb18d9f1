# A store of root's, one of a user's, and a small one.
{
  name = "layered-stores-gc";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.layeredStores.stores = {
      ci.lowerStore = "/srv/base";
      hers = {
        lowerStore = "daemon";
        owner = "alice";
      };
      small = {
        lowerStore = "/srv/base";
        ephemeral.enable = true;
        ephemeral.size = "64M";
      };
    };
  };

  testScript = builtins.readFile ./gc.py;
}
