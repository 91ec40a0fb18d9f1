# A store that somebody owns, and one of root's.
{
  name = "layered-stores-swaps";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.layeredStores.stores = {
      ci.lowerStore = "local";
      hers = {
        lowerStore = "local";
        owner = "alice";
      };
    };
  };

  testScript = builtins.readFile ./swaps.py;
}
