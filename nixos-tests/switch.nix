# A system, and what `nixos-rebuild switch` may find in its place: each a specialisation of it.
{
  name = "layered-stores-switch";

  nodes.machine =
    {
      config,
      lib,
      pkgs,
      ...
    }:
    let
      inherit (config.services.layeredStores) package;
      # The whole of what is declared, because a specialisation cannot take away in parts.
      stores = {
        kept.lowerStore = "local";
        changed.lowerStore = "local";
        doomed = {
          lowerStore = "local";
          daemon.enable = true;
          daemon.allowedUsers = [ "alice" ];
          # So that the switch has something to compare when it goes.
          daemon.serviceConfig.TasksMax = 4000;
          gc.automatic = true;
        };
        served = {
          lowerStore = "local";
          daemon.enable = true;
          daemon.allowedUsers = [ "alice" ];
        };
      };
      with' = change: { configuration.services.layeredStores.stores = lib.mkForce change; };
    in
    {
      imports = [ ./machine.nix ];

      services.layeredStores = { inherit stores; };

      specialisation = {
        # Something else has changed.
        unrelated.configuration.environment.etc."unrelated".source = pkgs.writeText "unrelated" "";
        # A store has another upper layer.
        changed = with' (
          stores
          // {
            changed = stores.changed // {
              upperLayer = "/var/lib/layered-stores/stores/changed/other";
            };
          }
        );
        # There is one store more.
        added = with' (stores // { added.lowerStore = "local"; });
        # A store is gone, and with it its Nix daemon and its timer.
        removed = with' (removeAttrs stores [ "doomed" ]);
        # A Nix daemon may take less memory.
        limited = with' (
          stores
          // {
            served = stores.served // {
              daemon = stores.served.daemon // {
                serviceConfig.MemoryMax = "1G";
              };
            };
          }
        );
        # A Nix daemon lets in somebody more.
        opened = with' (
          stores
          // {
            served = stores.served // {
              daemon = stores.served.daemon // {
                allowedUsers = [
                  "alice"
                  "bob"
                ];
              };
            };
          }
        );
        # What holds for every Nix daemon: in nix.conf, in the environment, and for those of stores.
        tuned.configuration.nix.settings.max-silent-time = 3600;
        proxied.configuration.networking.proxy.default = "http://proxy.example:3128";
        nicer.configuration.systemd.services."layered-stores-nix-daemon@".serviceConfig.Nice = 5;
        # There is another version of the package.
        upgraded.configuration.services.layeredStores.package = lib.mkForce (
          package.overrideAttrs (old: {
            postInstall = (old.postInstall or "") + "touch $out/share/doc/layered-stores/upgraded\n";
          })
        );
      };
    };

  testScript = builtins.readFile ./switch.py;
}
