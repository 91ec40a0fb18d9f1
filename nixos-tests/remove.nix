# Stores of all kinds that data is removed from.
{
  name = "layered-stores-remove";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.layeredStores.stores = {
      old.lowerStore = "local";
      above = {
        lowerStore = "layered:old";
        autostart = false;
      };
      own = {
        lowerStore = "local";
        root = "/srv/own/root";
        upperLayer = "/srv/own/upper";
        workDir = "/srv/own/work";
        owner = "alice";
      };
      scratch = {
        lowerStore = "local";
        ephemeral.enable = true;
        ephemeral.size = "64M";
      };
    };
  };

  testScript = builtins.readFile ./remove.py;
}
