# The D-Bus API is what the shipped files say it is, to the letter: documentation, arguments,
# annotations. The scenario jobs does the same for a job.
#
# Other programs are generated from these files. When the API changes on purpose, the failure prints
# what belongs into the file.

import re
from difflib import unified_diff

machine.wait_for_unit("multi-user.target")
machine.succeed("systemctl start layered-storesd")


def live_interface(object_path: str, interface: str) -> str:
    """The interface as the daemon describes it."""
    everything = machine.succeed(
        f"busctl introspect --xml-interface org.layeredstores1 {object_path}"
    )
    found = re.search(
        rf'^ *<interface name="{re.escape(interface)}">.*?</interface>$', everything, re.M | re.S
    )
    assert found is not None, f"{object_path} has no interface {interface}"
    lines = found.group().splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    # Line ends of doc comments may carry a blank.
    return "\n".join("  " + line[indent:].rstrip() for line in lines)


def shipped_interface(interface: str) -> str:
    """The interface as the installed file describes it."""
    return machine.succeed(
        'program=$(readlink -f "$(command -v layered-stores)"); '
        f'cat "${{program%/bin/*}}/share/dbus-1/interfaces/{interface}.xml"',
    )


def expected_file(live: str) -> str:
    """What the file has to hold."""
    doctype = (
        '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
        ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
    )
    return f"{doctype}<node>\n{live}\n</node>\n"


def compare(interface: str, object_path: str) -> None:
    expected = expected_file(live_interface(object_path, interface))
    shipped = shipped_interface(interface)
    if expected != shipped:
        print(
            "\n".join(
                unified_diff(
                    shipped.splitlines(), expected.splitlines(), "shipped", "live", lineterm=""
                )
            )
        )
        raise AssertionError(
            f"data/{interface}.xml is not what the daemon says; see the difference above"
        )


with subtest("the manager is as described"):
    compare("org.layeredstores1.Manager", "/org/layeredstores1")

with subtest("a store is as described"):
    compare("org.layeredstores1.Store", "/org/layeredstores1/store/example")

with subtest("the object manager lists what it should"):
    objects = machine.succeed(
        "busctl call org.layeredstores1 /org/layeredstores1"
        " org.freedesktop.DBus.ObjectManager GetManagedObjects"
    )
    assert "/org/layeredstores1/store/example" in objects, objects
