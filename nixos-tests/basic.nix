# A store whose lower store is filled later, and one on this machine's own store.
{
  name = "layered-stores-basic";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.layeredStores.stores = {
      # Its lower store is filled by the scenario, so nothing is there at the first boot.
      ci = {
        lowerStore = "/srv/lower";
        required = false;
      };
      host.lowerStore = "local";
    };
  };

  testScript = builtins.readFile ./basic.py;
}
