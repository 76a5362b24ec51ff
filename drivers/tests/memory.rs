//! The test driver: what the service sees of a guest is what it would see of QEMU's.

use serde_json::Value;
use std::sync::{Arc, Mutex};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use virt_drivers::test::{Asked, TestDriver};
use virt_model::domain::DomainDef;
use virt_model::driver::*;
use virt_model::state::{PmSuspended, ShutdownBy, Suspended};

#[derive(Default)]
struct Disk(Mutex<Vec<Value>>);

impl Recorder for Disk {
    fn record(&self, record: Value) -> std::io::Result<()> {
        self.0.lock().unwrap().push(record);
        Ok(())
    }
}

type Reports = EventStream;

fn launch(more: &str) -> (Launch, Reports) {
    let uuid = Uuid::new_v4();
    let xml = format!(
        "<domain type='test'><name>t-{uuid}</name><uuid>{uuid}</uuid><memory>8192</memory><os><type>hvm</type></os>{more}</domain>"
    );
    let (events, reports) = reports();
    let launch = Launch {
        accepted: Default::default(),
        def: Arc::new(DomainDef::parse(&xml).unwrap()),
        paused: false,
        reset_nvram: false,
        from: None,
        runtime_dir: "/nowhere".into(),
        log_file: "/nowhere/log".into(),
        recorder: Arc::new(Disk::default()),
        events,
        cancel: CancellationToken::new(),
    };
    (launch, reports)
}

async fn start(driver: &TestDriver, more: &str) -> (Arc<dyn Instance>, Uuid, Reports) {
    let (launch, reports) = launch(more);
    let uuid = launch.def.uuid;
    (driver.start(launch).await.unwrap().instance, uuid, reports)
}

const OFF: DriverEvent = DriverEvent::PoweredOff { by: ShutdownBy::Guest, rebooting: false };

#[tokio::test]
async fn lives_as_the_contract_says() {
    let driver = TestDriver::default();
    let (guest, uuid, mut reports) = start(&driver, "").await;
    guest.suspend().await.unwrap();
    assert_eq!(reports.try_recv(), Ok(DriverEvent::Suspended(Suspended::Paused)));
    guest.suspend().await.unwrap();
    guest.resume().await.unwrap();
    assert_eq!(reports.try_recv(), Ok(DriverEvent::Resumed));
    guest.reboot(ShutdownMode::Default).await.unwrap();
    assert!(reports.try_recv().is_err());
    guest.shutdown(ShutdownMode::Acpi).await.unwrap();
    assert_eq!(reports.try_recv(), Ok(OFF));
    assert!(matches!(guest.resume().await, Err(DriverError::Hypervisor(_))));
    guest.reset().await.unwrap();
    guest.resume().await.unwrap();
    assert_eq!(reports.try_recv(), Ok(DriverEvent::Resumed));
    guest.destroy(false).await.unwrap();
    assert_eq!(reports.try_recv(), Ok(DriverEvent::Exited(Exit::Requested)));
    assert!(reports.recv().await.is_none(), "the last report");
    guest.destroy(false).await.unwrap();
    assert!(matches!(guest.suspend().await, Err(DriverError::Gone)));
    assert!(driver.guest(uuid).is_none());
}

#[tokio::test]
async fn guests_do_as_tests_want() {
    let driver = TestDriver::default();
    let (guest, uuid, mut reports) = start(&driver, "<on_reboot>destroy</on_reboot>").await;
    let control = driver.guest(uuid).unwrap();
    control.ignore_shutdown(true);
    guest.shutdown(ShutdownMode::Default).await.unwrap();
    assert_eq!(control.asked(), Some(Asked::Shutdown));
    control.io_error();
    assert_eq!(reports.try_recv(), Ok(DriverEvent::Suspended(Suspended::IoError)));
    guest.resume().await.unwrap();
    control.watchdog();
    guest.resume().await.unwrap();
    control.fall_asleep();
    control.wake();
    control.panic();
    guest.reset().await.unwrap();
    guest.resume().await.unwrap();
    control.reboot();
    let told: Vec<DriverEvent> = std::iter::from_fn(|| reports.try_recv().ok()).collect();
    let expected = [
        DriverEvent::Resumed,
        DriverEvent::Suspended(Suspended::Watchdog),
        DriverEvent::Resumed,
        DriverEvent::PmSuspended(PmSuspended::Memory),
        DriverEvent::Woken,
        DriverEvent::Panicked,
        DriverEvent::Resumed,
        DriverEvent::PoweredOff { by: ShutdownBy::Guest, rebooting: true },
    ];
    assert_eq!(told, expected);
    control.die("out of luck");
    assert_eq!(reports.try_recv(), Ok(DriverEvent::Exited(Exit::Died("out of luck".into()))));
}

#[tokio::test(start_paused = true)]
async fn a_hung_hypervisor_answers_nothing_but_destroy() {
    let driver = TestDriver::default();
    let (guest, uuid, mut reports) = start(&driver, "").await;
    driver.guest(uuid).unwrap().hang(true);
    assert!(matches!(guest.suspend().await, Err(DriverError::TimedOut(_))));
    assert!(matches!(guest.destroy(true).await, Err(DriverError::TimedOut(_))));
    let (waiting, ()) = tokio::join!(guest.suspend(), async { guest.destroy(false).await.unwrap() });
    assert!(matches!(waiting, Err(DriverError::Gone)));
    assert_eq!(reports.try_recv(), Ok(DriverEvent::Exited(Exit::Requested)));
}

#[tokio::test]
async fn starts_wait_fail_and_are_cancelled() {
    let driver = TestDriver::default();
    let (launch_one, _reports) = launch("");
    driver.hang_start(launch_one.def.uuid);
    let cancel = launch_one.cancel.clone();
    let (started, ()) = tokio::join!(driver.start(launch_one), async { cancel.cancel() });
    assert!(matches!(started.err(), Some(DriverError::Cancelled)));
    let (launch_two, _reports) = launch("");
    let go = driver.hang_start(launch_two.def.uuid);
    go.notify_one();
    driver.start(launch_two).await.unwrap();
    let (launch_three, _reports) = launch("");
    driver.fail_start(launch_three.def.uuid, DriverError::Storage("no disk".into()));
    assert!(matches!(driver.start(launch_three).await.err(), Some(DriverError::Storage(_))));
}

#[tokio::test]
async fn its_guests_end_with_virtd() {
    let driver = TestDriver::default();
    let (launch, _reports) = launch("");
    let (live, recorder) = (launch.def.clone(), launch.recorder.clone());
    let (events, _) = reports();
    let record = serde_json::json!({});
    let found = Reconnect {
        live,
        record,
        last: Condition::Running,
        runtime_dir: "/nowhere".into(),
        log_file: "/nowhere/log".into(),
        recorder,
        events,
    };
    assert!(driver.reconnect(found).await.unwrap().is_none());
}

#[tokio::test]
async fn what_it_cannot_do_is_refused() {
    let driver = TestDriver::default();
    let (launch, _reports) = launch("<vcpu>1000</vcpu>");
    assert_eq!(driver.check(&launch.def).await.len(), 1);
    assert!(matches!(driver.native(&launch.def, "qemu-argv").await, Err(DriverError::Unsupported(_))));
    assert!(matches!(driver.start(launch).await.err(), Some(DriverError::Config(_))));
    assert!(driver.capabilities().await.unwrap().contains("<domain type='test'/>"));
}

#[tokio::test]
async fn ten_thousand_guests_are_cheap() {
    let driver = TestDriver::default();
    let mut guests = Vec::new();
    let (Launch { def, recorder, .. }, _) = launch("");
    for _ in 0..10_000 {
        let (events, reports) = reports();
        let launch = Launch {
            accepted: Default::default(),
            def: Arc::new(DomainDef { uuid: Uuid::new_v4(), ..DomainDef::clone(&def) }),
            paused: false,
            reset_nvram: false,
            from: None,
            runtime_dir: "/nowhere".into(),
            log_file: "/nowhere/log".into(),
            recorder: recorder.clone(),
            events,
            cancel: CancellationToken::new(),
        };
        guests.push((driver.start(launch).await.unwrap().instance, reports));
    }
    assert_eq!(driver.running(), 10_000);
    for (guest, reports) in &mut guests {
        guest.destroy(false).await.unwrap();
        assert!(reports.try_recv().is_ok());
    }
    assert_eq!(driver.running(), 0);
}
