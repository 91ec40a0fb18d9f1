# A store in memory, and one on disk.
{
  name = "layered-stores-ephemeral";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.layeredStores.stores = {
      scratch = {
        lowerStore = "local";
        ephemeral.enable = true;
        ephemeral.size = "64M";
        mountOptions = [ "noatime" ];
      };
      kept.lowerStore = "local";
    };
  };

  testScript = builtins.readFile ./ephemeral.py;
}
