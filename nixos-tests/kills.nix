# A store with a Nix daemon, and one that somebody owns.
{
  name = "layered-stores-kills";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.layeredStores.stores = {
      ci = {
        lowerStore = "local";
        daemon.enable = true;
      };
      hers = {
        lowerStore = "local";
        owner = "alice";
      };
    };
  };

  testScript = builtins.readFile ./kills.py;
}
