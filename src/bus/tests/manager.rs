//! The methods of `org.layeredstores1.Manager`.

use layered_stores_client::store_path;
use zbus::wire::OwnedObjectPath;

use super::{AUTO, BY_HAND, NO, assert_refused, call_manager, manager, refused, store, with_daemon};
use crate::supervisor::{
    Command, Error,
    simulation::{Event, name},
};

#[test]
fn stores_are_listed_and_found_by_name_and_by_directory() {
    with_daemon([AUTO, BY_HAND, AUTO], async |setup| {
        // Everybody may ask that.
        let client = setup.client(7).await;
        let row = |of, state: &str| (name(of).to_string(), state.to_owned(), store_path(&name(of)));
        let listed = manager(&client).await.list_stores().await.expect("a list");
        assert_eq!(listed, [row(0, "active"), row(1, "inactive"), row(2, "active")]);
        for of in 0..3 {
            let dir = setup.real_store_dir(of);
            for (method, argument) in [
                ("GetStore", name(of).to_string()),
                ("GetStoreByPath", dir.clone()),
                ("GetStoreByPath", format!("{dir}/")),
            ] {
                let answer = call_manager(&client, method, &argument).await.expect("a store");
                let path: OwnedObjectPath = answer.body().deserialize().expect("a path");
                assert_eq!(path, store_path(&name(of)), "{method} {argument}");
            }
        }
        let unknown = call_manager(&client, "GetStore", &"x").await;
        assert_refused(unknown, "NoSuchStore", Error::NoSuchStore("x".to_owned()));
        let unknown = call_manager(&client, "GetStoreByPath", &"/x").await;
        assert_refused(unknown, "NoSuchStore", Error::NoStoreAtPath("/x".to_owned()));
        assert_eq!(setup.polkit.asked(), []);
    });
}

#[test]
fn a_refresh_is_asked_for_by_directory() {
    with_daemon([AUTO, BY_HAND, AUTO], async |setup| {
        let client = setup.client(0).await;
        setup.befall(Event::Change(0, 0, false, true)).await;
        call_manager(&client, "Remount", &setup.real_store_dir(0)).await.expect("a refresh");
        assert_eq!(setup.play.handle().store("a").map(|cell| cell.get().last_refresh), Ok("reconfigured"));
        let refused = call_manager(&client, "Remount", &setup.real_store_dir(1)).await;
        let not_active = Error::NotActive(name(1), "start it with `layered-stores start b`".to_owned());
        assert_refused(refused, "NotActive", not_active);
        let unknown = call_manager(&client, "Remount", &"/x").await;
        assert_refused(unknown, "NoSuchStore", Error::NoStoreAtPath("/x".to_owned()));
    });
}

#[test]
fn a_reload_returns_when_stores_have_come_and_gone() {
    with_daemon([AUTO, AUTO, NO], async |setup| {
        let client = setup.client(0).await;
        let manager = manager(&client).await;
        setup.play.declare(&[AUTO, NO, AUTO]);
        manager.reload().await.expect("a reload");
        let listed: Vec<_> = manager.list_stores().await.expect("a list");
        let listed: Vec<_> = listed.iter().map(|(name, state, _)| (name.as_str(), state.as_str())).collect();
        assert_eq!(listed, [("a", "active"), ("c", "active")]);
        let gone = refused(store(&client, 1).await.start().await);
        assert_eq!(gone.0, "org.freedesktop.DBus.Error.UnknownObject");
    });
}

#[test]
fn a_configuration_with_mistakes_is_refused_with_all_of_them_and_nothing_changes() {
    with_daemon([AUTO, NO, NO], async |setup| {
        let client = setup.client(0).await;
        let manager = manager(&client).await;
        setup.play.declare(&[NO, AUTO, NO]);
        setup.befall(Event::Mistake(true)).await;
        let answer = manager.reload().await;
        let Err(error) = setup.play.handle().ask(Command::Reload).await else { panic!("it takes mistakes") };
        assert!(error.to_string().contains("\n/config.toml:"), "{error}");
        assert_refused(answer, "InvalidConfiguration", error);
        assert_eq!(manager.list_stores().await.expect("a list")[0].0, "a");
        setup.befall(Event::Mistake(false)).await;
        manager.reload().await.expect("a reload");
        assert_eq!(manager.list_stores().await.expect("a list")[0].0, "b");
    });
}

#[test]
fn data_is_removed_of_stores_that_are_down_and_of_those_that_were() {
    with_daemon([AUTO, BY_HAND, AUTO], async |setup| {
        let client = setup.client(0).await;
        let manager = manager(&client).await;
        setup.befall(Event::RemoveData(1)).await;
        setup.wait(60).await;
        manager.remove_data("b").await.expect("it is down");
        let carries = Error::LowerOf(name(0), vec!["c".to_owned()]);
        assert_refused(manager.remove_data("a").await, "LowerOfOthers", carries);
        let active = Error::InUse(name(2), "it is not stopped; run `layered-stores stop c` first".to_owned());
        assert_refused(manager.remove_data("c").await, "InUse", active);
        setup.befall(Event::Fail(1, 1)).await;
        let failed = Error::RemoveFailed(name(1), "cannot read the mount table: a step fails".to_owned());
        assert_refused(manager.remove_data("b").await, "RemoveFailed", failed);
        setup.play.declare(&[AUTO, NO, AUTO]);
        manager.reload().await.expect("a reload");
        manager.remove_data("b").await.expect("it is declared no more");
        let nothing = Error::NothingLeft("x".parse().expect("a name"));
        assert_refused(manager.remove_data("x").await, "NoSuchStore", nothing);
        assert_refused(manager.remove_data("../x").await, "NoSuchStore", Error::NoSuchStore("../x".to_owned()));
        assert_eq!(manager.list_left_over().await.expect("a list"), []);
    });
}

#[test]
fn the_version_is_that_of_the_package() {
    with_daemon([NO, NO, NO], async |setup| {
        let client = setup.client(7).await;
        let properties = zbus::fdo::PropertiesProxy::builder(&client)
            .destination(layered_stores_client::BUS_NAME)
            .path(layered_stores_client::MANAGER_PATH)
            .build()
            .await
            .expect("a proxy");
        let interface = "org.layeredstores1.Manager".try_into().expect("a name");
        let version = properties.get(interface, "Version").await.expect("a version");
        assert_eq!(String::try_from(version).as_deref(), Ok(env!("CARGO_PKG_VERSION")));
    });
}
