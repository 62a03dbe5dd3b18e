//! Clients of others: the `qemu.qmp` package and a text editor's worth of shell.

use std::path::Path;

use tests::{skip, tools};

use crate::monitored;

/// A script for qemu.qmp: the asynchronous client, its events, an error.
const SCRIPT: &str = r#"
import asyncio, sys
from qemu.qmp import QMPClient
from qemu.qmp import ExecuteError

async def main():
    qmp = QMPClient('tests')
    await qmp.connect(sys.argv[1])
    version = await qmp.execute('query-version')
    assert version['qemu']['major'] >= 10, version
    await qmp.execute('blockdev-add', {'driver': 'null-co', 'node-name': 'py', 'size': 1048576})
    nodes = await qmp.execute('query-named-block-nodes', {'flat': True})
    assert 'py' in [node['node-name'] for node in nodes], nodes
    try:
        await qmp.execute('blockdev-del', {'node-name': 'nosuch'})
    except ExecuteError as error:
        assert str(error) == "Failed to find node with node-name='nosuch'", error
    else:
        raise AssertionError('no error')
    await qmp.execute('nbd-server-start', {'addr': {'type': 'unix', 'data': {'path': sys.argv[1] + '.nbd'}}})
    await qmp.execute('block-export-add', {'type': 'nbd', 'id': 'e', 'node-name': 'py'})
    with qmp.listener('BLOCK_EXPORT_DELETED') as listener:
        await qmp.execute('block-export-del', {'id': 'e'})
        event = await asyncio.wait_for(listener.get(), 30)
        assert event['data'] == {'id': 'e'}, event
    results = await asyncio.gather(*(qmp.execute('query-version') for _ in range(20)))
    assert all(result == version for result in results)
    await qmp.execute('quit')
    try:
        await qmp.disconnect()
    except EOFError:
        pass  # the daemon was faster
    print('all well')

asyncio.run(main())
"#;

/// The Python of a virtual environment with qemu.qmp, made once in the target directory; `None` when it cannot be made.
fn python_with_qmp() -> Option<String> {
    let own = std::env::current_exe().unwrap();
    let venv = own.ancestors().nth(2).unwrap().join("venv-qemu-qmp");
    let python = venv.join("bin/python").to_string_lossy().into_owned();
    let has = || Path::new(&python).is_file() && tools::run(&python, ["-c", "import qemu.qmp"]).status.success();
    if has() {
        return Some(python);
    }
    let venv = venv.to_string_lossy().into_owned();
    let made = tools::run("python3", ["-m", "venv", &venv]).status.success()
        && tools::run(&python, ["-m", "pip", "install", "-q", "qemu.qmp"]).status.success();
    (made && has()).then_some(python)
}

#[test]
fn the_qemu_qmp_package() {
    let Some(python) = python_with_qmp() else {
        skip!("no virtual environment with qemu.qmp can be made here (python3-venv and PyPI)");
    };
    let mut daemon = monitored();
    let socket = daemon.path("qmp.sock").to_string_lossy().into_owned();
    let text = tools::ok(&python, ["-c", SCRIPT, &socket]);
    assert_eq!(text, "all well\n");
    assert_eq!(daemon.wait().code(), Some(0));
}
