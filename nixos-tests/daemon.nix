# A store on this machine's own store, with a Nix daemon for one user and one group.
{
  name = "layered-stores-daemon";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.layeredStores.stores.ci = {
      lowerStore = "daemon";
      daemon = {
        enable = true;
        allowedUsers = [ "alice" ];
        allowedGroups = [ "bob" ];
        settings.max-jobs = 2;
      };
    };

    users.users.bob.group = "bob";
    users.groups.bob = { };
  };

  testScript = builtins.readFile ./daemon.py;
}
