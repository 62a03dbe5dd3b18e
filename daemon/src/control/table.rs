//! The table of commands, and of events: what stands here exists, in `query-commands` and in `query-qmp-schema`.

use super::Control;
use block::driver::LocalFuture;
use qapi::def::CommandDef;
use qapi::schema::Schema;
use qapi::types::{
    block::*, block_check::*, block_event::*, block_query::*, chardev::*, control::*, create::BlockdevCreate,
    descriptors::*, export::*, fault::*, job::*, qom::*, reservation::*, snapshot::*,
};
use qapi::{Command, Event, Qapi, Result, Value};

/// A command: what it is, and what carries it out.
pub struct Row {
    /// Name, arguments, documentation.
    pub def: fn() -> &'static CommandDef,
    /// Reads the arguments and does it.
    pub run: Run,
}

/// How a command is carried out.
#[derive(Clone, Copy)]
pub enum Run {
    /// By the control task, which takes no other message until it is done.
    Here(for<'a> fn(&'a mut Control, &'a Value) -> LocalFuture<'a, Result<Value>>),
    /// Begun by the control task, and finished beside it: what takes as long as somebody else likes and changes nothing of
    /// the daemon's own.
    Beside(fn(&mut Control, &Value) -> Result<Goes>),
    /// Begun by the control task, and finished beside it while nothing else may change: only [`looks_on`] commands are
    /// carried out before it has ended.
    Alone(for<'a> fn(&'a mut Control, &'a Value) -> LocalFuture<'a, Result<Goes>>),
}

/// The rest of a command that goes on by itself.
pub type Goes = LocalFuture<'static, Result<Value>>;

/// How the names of commands begin that change nothing, or only what a test holds back, or that everything ends.
const LOOKS_ON: &[&str] = &["quit", "query-", "x-query-", "x-debug-query-", "qom-get", "qom-list", "x-fault-"];

/// Whether a command may be carried out while another one has the nodes for itself.
pub fn looks_on(name: &str) -> bool {
    LOOKS_ON.iter().any(|begin| name.starts_with(begin))
}

macro_rules! commands {
    ($($args:ty => $method:ident,)*; beside $($long:ty => $begin:ident,)*; alone $($sole:ty => $start:ident,)*) => {
        &[$(Row {
            def: <$args as Command>::command,
            run: Run::Here(|control, arguments| Box::pin(async move {
                let arguments = <$args>::from_value(arguments)?;
                let result: <$args as Command>::Ret = control.$method(arguments).await?;
                Ok(result.to_value())
            })),
        },)*
        $(Row {
            def: <$long as Command>::command,
            run: Run::Beside(|control, arguments| {
                let begun = control.$begin(<$long>::from_value(arguments)?)?;
                Ok(Box::pin(async move {
                    let result: <$long as Command>::Ret = begun.await?;
                    Ok(result.to_value())
                }))
            }),
        },)*
        $(Row {
            def: <$sole as Command>::command,
            run: Run::Alone(|control, arguments| Box::pin(async move {
                let begun = control.$start(<$sole>::from_value(arguments)?).await?;
                Ok(Box::pin(async move {
                    let result: <$sole as Command>::Ret = begun.await?;
                    Ok(result.to_value())
                }) as Goes)
            })),
        },)*]
    };
}

/// All commands. `qmp_capabilities` belongs to the session of a monitor, which knows whether it may be used; a request that
/// reaches the control task comes too late.
pub const COMMANDS: &[Row] = commands! {
    QmpCapabilities => qmp_capabilities,
    QueryVersion => query_version,
    QueryCommands => query_commands,
    QueryQmpSchema => query_qmp_schema,
    Quit => quit,
    XQuerySandbox => x_query_sandbox,
    ObjectDel => object_del,
    QomList => qom_list,
    QomListGet => qom_list_get,
    QomGet => qom_get,
    QomSet => qom_set,
    QomListTypes => qom_list_types,
    QomListProperties => qom_list_properties,
    Getfd => getfd,
    Closefd => closefd,
    AddFd => add_fd,
    RemoveFd => remove_fd,
    QueryFdsets => query_fdsets,
    ChardevRemove => chardev_remove,
    ChardevSendBreak => chardev_send_break,
    RingbufWrite => ringbuf_write,
    RingbufRead => ringbuf_read,
    QueryChardev => query_chardev,
    QueryChardevBackends => query_chardev_backends,
    BlockdevOptions => blockdev_add,
    BlockdevReopen => blockdev_reopen,
    BlockdevDel => blockdev_del,
    BlockdevSetActive => blockdev_set_active,
    BlockSetWriteThreshold => block_set_write_threshold,
    XBlockdevChange => x_blockdev_change,
    XBlockdevSetIothread => x_blockdev_set_iothread,
    BlockResize => block_resize,
    XFaultSetRules => x_fault_set_rules,
    XFaultRelease => x_fault_release,
    XFaultCrash => x_fault_crash,
    XFaultRestart => x_fault_restart,
    XQueryFault => x_query_fault,
    QueryBlock => query_block,
    QueryNamedBlockNodes => query_named_block_nodes,
    QueryBlockstats => query_blockstats,
    XDebugQueryBlockGraph => x_debug_query_block_graph,
    NbdServerOptionsLegacy => nbd_server_start,
    NbdServerAddOptions => nbd_server_add,
    NbdServerStop => nbd_server_stop,
    BlockdevCreate => blockdev_create,
    BlockdevSnapshot => blockdev_snapshot,
    BlockdevSnapshotSync => blockdev_snapshot_sync,
    BlockdevSnapshotInternalSync => blockdev_snapshot_internal_sync,
    BlockdevSnapshotDeleteInternalSync => blockdev_snapshot_delete_internal_sync,
    ChangeBackingFile => change_backing_file,
    Transaction => transaction,
    QueryJobs => query_jobs,
    JobPause => job_pause,
    JobResume => job_resume,
    JobCancel => job_cancel,
    JobComplete => job_complete,
    JobFinalize => job_finalize,
    JobDismiss => job_dismiss,
    QueryBlockJobs => query_block_jobs,
    BlockJobPause => block_job_pause,
    BlockJobResume => block_job_resume,
    BlockJobCancel => block_job_cancel,
    BlockJobComplete => block_job_complete,
    BlockJobFinalize => block_job_finalize,
    BlockJobDismiss => block_job_dismiss,
    BlockJobSetSpeed => block_job_set_speed,
    BlockExportOptions => block_export_add,
    QueryBlockExports => query_block_exports,
    XBlockExportResume => x_block_export_resume,
    QueryPrManagers => query_pr_managers,
    ; beside
    ObjectOptions => object_add,
    NbdServerRemove => nbd_server_remove,
    BlockExportDel => block_export_del,
    ChardevAdd => chardev_add,
    ChardevChange => chardev_change,
    XBlockPrIn => x_block_pr_in,
    XBlockPrOut => x_block_pr_out,
    ; alone
    XBlockdevCheck => x_blockdev_check,
};

/// All events.
pub const EVENTS: &[fn() -> &'static qapi::def::EventDef] = &[
    <BlockExportDeleted as Event>::event,
    <BlockImageCorrupted as Event>::event,
    <BlockIoError as Event>::event,
    <BlockWriteThreshold as Event>::event,
    <JobStatusChange as Event>::event,
    <PrManagerStatusChanged as Event>::event,
    <QuorumFailure as Event>::event,
    <QuorumReportBad as Event>::event,
    <VserportChange as Event>::event,
];

/// The command of that name.
pub fn find(name: &str) -> Option<&'static Row> {
    COMMANDS.iter().find(|row| (row.def)().name == name)
}

/// What `query-qmp-schema` tells.
pub fn schema() -> Schema {
    let schema = COMMANDS.iter().fold(Schema::new(), |schema, row| schema.add_command((row.def)()));
    EVENTS.iter().fold(schema, |schema, event| schema.add_event(event()))
}
