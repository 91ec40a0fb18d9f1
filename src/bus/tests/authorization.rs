//! Who may call what.

use super::{AUTO, BY_HAND, NO, Setup, call_manager, manager, polkit::Says, refused, store, with_daemon};
use crate::supervisor::simulation::{Event, OWNER};
use layered_stores_client::{BUS_NAME, store_path};
use zbus::Connection;

/// A user who owns nothing.
const STRANGER: u32 = 7;

const DENIED: &str = "org.freedesktop.DBus.Error.AccessDenied";

/// The methods that not everybody may call, with the actions that they need.
const METHODS: [(&str, &str); 7] = [
    ("Start", "org.layeredstores1.start"),
    ("Stop", "org.layeredstores1.stop"),
    ("Remount", "org.layeredstores1.remount"),
    ("Verify", "org.layeredstores1.verify"),
    ("Manager.Remount", "org.layeredstores1.remount"),
    ("Manager.RemoveData", "org.layeredstores1.remove-data"),
    ("Manager.Reload", "org.layeredstores1.reload"),
];

impl Setup {
    /// Calls a method about the second store.
    async fn call(&self, client: &Connection, method: &str) -> zbus::Result<()> {
        let (store, manager) = (store(client, 1).await, manager(client).await);
        match method {
            "Start" => store.start().await,
            "Stop" => store.stop().await,
            "Remount" => store.remount().await,
            "Verify" => store.verify().await.map(drop),
            "Manager.Remount" => call_manager(client, "Remount", &self.real_store_dir(1)).await.map(drop),
            "Manager.RemoveData" => manager.remove_data("b").await,
            "Manager.Reload" => manager.reload().await,
            other => panic!("no method: {other}"),
        }
    }
}

#[test]
fn strangers_may_what_polkit_allows_and_each_method_asks_for_its_action() {
    with_daemon([NO, AUTO, NO], async |setup| {
        let client = setup.client(STRANGER).await;
        for (method, action) in METHODS {
            let about = (action != "org.layeredstores1.reload").then_some("b".to_owned());
            let what = about.as_ref().map_or_else(|| action.to_owned(), |store| format!("{action} on store {store:?}"));
            let or_owner = if action.ends_with(".remount") { " or as the store's owner" } else { "" };
            setup.polkit.says(Says::No);
            let answer = refused(setup.call(&client, method).await);
            let message = format!("{what} is refused: polkit does not allow it; run it as root{or_owner}");
            assert_eq!(answer, (DENIED.to_owned(), message), "{method}");
            assert_eq!(setup.polkit.asked(), [(action.to_owned(), about.clone())], "{method}");
            setup.polkit.says(Says::Yes);
            let answer = setup.call(&client, method).await;
            match method {
                "Manager.RemoveData" => assert_eq!(refused(answer).0, "org.layeredstores1.Error.InUse"),
                _ => answer.unwrap_or_else(|error| panic!("{method}: {error}")),
            }
            assert_eq!(setup.polkit.asked(), [(action.to_owned(), about)], "{method}");
            setup.call(&setup.client(0).await, "Start").await.expect("up again");
        }
    });
}

#[test]
fn root_may_everything_and_an_owner_may_refresh_without_polkit() {
    with_daemon([NO, AUTO, NO], async |setup| {
        let (root, owner) = (setup.client(0).await, setup.client(OWNER).await);
        for (method, action) in METHODS {
            if method != "Manager.RemoveData" {
                setup.call(&root, method).await.unwrap_or_else(|error| panic!("{method}: {error}"));
            }
            setup.call(&root, "Start").await.expect("up again");
            assert_eq!(setup.polkit.asked(), [], "{method}");
            let answer = setup.call(&owner, method).await;
            if action == "org.layeredstores1.remount" {
                answer.unwrap_or_else(|error| panic!("{method}: {error}"));
                assert_eq!(setup.polkit.asked(), [], "{method}");
            } else {
                assert_eq!(refused(answer).0, DENIED, "{method}");
                assert_eq!(setup.polkit.asked().len(), 1, "{method}");
            }
        }
    });
}

#[test]
fn who_could_authenticate_and_has_not_said_so_is_told_to() {
    with_daemon([NO, BY_HAND, NO], async |setup| {
        setup.polkit.says(Says::Challenge);
        let client = setup.client(STRANGER).await;
        let path = store_path(&crate::supervisor::simulation::name(1));
        let interface = Some("org.layeredstores1.Store");
        let answer = refused(client.call_method(Some(BUS_NAME), path, interface, "Start", &()).await);
        assert_eq!(answer.0, "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired");
        assert!(answer.1.contains("needs authentication"), "{}", answer.1);
    });
}

#[test]
fn a_polkit_that_does_not_answer_is_not_waited_for_without_end() {
    with_daemon([NO, AUTO, NO], async |setup| {
        setup.polkit.says(Says::Silence);
        let client = setup.client(STRANGER).await;
        // Nobody is asked for a password here.
        let answer = refused(setup.call(&client, "Manager.Remount").await);
        assert_eq!(answer.0, DENIED);
        assert!(answer.1.contains("no answer within 10 s"), "{}", answer.1);
        assert_eq!(setup.polkit.cancelled(), 1);
    });
}

#[test]
fn questions_of_who_leaves_are_taken_back_and_a_user_has_only_so_many() {
    with_daemon([NO, AUTO, NO], async |setup| {
        setup.polkit.says(Says::Silence);
        let client = setup.client(STRANGER).await;
        for _ in 0..4 {
            let store = store(&client, 1).await;
            tokio::spawn(async move { store.stop().await });
        }
        setup.wait(1).await;
        let other = setup.client(STRANGER).await;
        let answer = refused(setup.call(&other, "Stop").await);
        assert_eq!(answer.0, "org.freedesktop.DBus.Error.LimitsExceeded");
        client.close().await.expect("a connection");
        setup.wait(1).await;
        assert_eq!(setup.polkit.cancelled(), 4);
        setup.polkit.says(Says::Yes);
        setup.call(&other, "Stop").await.expect("it may ask again");
    });
}

#[test]
fn without_polkit_only_root_gets_anywhere() {
    with_daemon([NO, BY_HAND, NO], async |setup| {
        let (root, stranger) = (setup.client(0).await, setup.client(STRANGER).await);
        setup.end_polkit().await;
        let answer = refused(setup.call(&stranger, "Start").await);
        assert_eq!(answer.0, DENIED);
        assert!(answer.1.contains("polkit cannot be asked"), "{}", answer.1);
        setup.befall(Event::Wait(std::time::Duration::ZERO)).await;
        setup.call(&root, "Start").await.expect("root needs no polkit");
    });
}
