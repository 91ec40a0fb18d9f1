# A layered store on a layered store.
{
  name = "layered-stores-stack";

  nodes.machine = {
    imports = [ ./machine.nix ];

    # Their lower store is filled by the scenario, so nothing is there at the first boot.
    services.layeredStores.stores = {
      bottom = {
        lowerStore = "/srv/lower";
        root = "/srv/bottom/root";
        upperLayer = "/srv/bottom/upper";
        workDir = "/srv/bottom/work";
        required = false;
      };
      top = {
        lowerStore = "layered:bottom";
        root = "/srv/top/root";
        upperLayer = "/srv/top/upper";
        workDir = "/srv/top/work";
        required = false;
      };
    };
  };

  testScript = builtins.readFile ./stack.py;
}
