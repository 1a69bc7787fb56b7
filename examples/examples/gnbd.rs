//! An NBD server with one export in memory, and a client that writes and reads it, without any cluster.
//!
//! `cargo run --example gnbd` prints the address (any NBD client can use it while it runs) and what was read.

use quorate_gnbd::client::{NbdConfig, NbdDevice};
use quorate_gnbd::server::{Export, Listen, Server, ServerConfig};
use quorate_gnbd::{BlockDevice, Buf, Device, MemoryDevice, WriteFlags};
use std::error::Error;
use std::time::Duration;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let export = Export {
        name: "memory".into(),
        description: "16 MiB that vanish".into(),
        device: Device::new(MemoryDevice::new(16 << 20)),
        cluster: false,
    };
    let config = ServerConfig {
        listen: vec![Listen { address: "127.0.0.1:0".parse()?, tls: false }],
        tls: None,
        exports: vec![export],
        fence: None,
        connections_max: 16,
    };
    let server = Server::start(config).await?;
    let address = server.addresses().first().ok_or("no address")?.to_string();
    println!("serving nbd://{address}/memory");

    let client = NbdConfig { address, export: "memory".into(), tls: None, member: None, connections: 2 };
    let device = NbdDevice::connect(client).await?;
    println!("{:?}", device.geometry());
    let mut block = Buf::zeroed(4096);
    block[..5].copy_from_slice(b"hello");
    device.write(8192, block, WriteFlags { fua: true }).await?;
    let back = device.read(8192, Buf::zeroed(4096)).await?;
    println!("read back: {}", String::from_utf8_lossy(&back[..5]));
    device.shutdown(Duration::from_secs(1)).await?;
    server.shutdown(Duration::from_secs(1)).await;
    Ok(())
}
