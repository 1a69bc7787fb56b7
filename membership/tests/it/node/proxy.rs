//! Something between two nodes that can be cut: it goes on accepting and carries nothing, as a broken network does.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::watch;

/// Carries UDP and TCP to one address.
pub(crate) struct Proxy {
    address: SocketAddr,
    cut: watch::Sender<bool>,
    _runtime: tokio::runtime::Runtime,
}

impl Proxy {
    pub(crate) fn to(target: SocketAddr) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let cut = watch::Sender::new(false);
        let address = runtime.block_on(async {
            let (tcp, udp) = loop {
                let tcp = TcpListener::bind((target.ip(), 0)).await.unwrap();
                if let Ok(udp) = UdpSocket::bind(tcp.local_addr().unwrap()).await {
                    break (tcp, udp);
                }
            };
            let address = tcp.local_addr().unwrap();
            tokio::spawn(carry_tcp(tcp, target, cut.subscribe()));
            tokio::spawn(carry_udp(Arc::new(udp), target, cut.subscribe()));
            address
        });
        Self { address, cut, _runtime: runtime }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn cut(&self, cut: bool) {
        self.cut.send_replace(cut);
    }
}

async fn carry_tcp(listener: TcpListener, target: SocketAddr, cut: watch::Receiver<bool>) {
    while let Ok((here, _)) = listener.accept().await {
        let mut cut = cut.clone();
        tokio::spawn(async move {
            if cut.wait_for(|cut| !cut).await.is_err() {
                return;
            }
            let Ok(there) = TcpStream::connect(target).await else { return };
            let (here_read, here_write) = here.into_split();
            let (there_read, there_write) = there.into_split();
            tokio::select! {
                () = pump(here_read, there_write, cut.clone()) => {}
                () = pump(there_read, here_write, cut) => {}
            }
        });
    }
}

async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut cut: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok(count) = from.read(&mut buffer).await else { return };
        if cut.wait_for(|cut| !cut).await.is_err()
            || count == 0
            || to.write_all(&buffer[..count]).await.is_err()
        {
            return;
        }
    }
}

async fn carry_udp(here: Arc<UdpSocket>, target: SocketAddr, cut: watch::Receiver<bool>) {
    let mut clients: BTreeMap<SocketAddr, Arc<UdpSocket>> = BTreeMap::new();
    let mut buffer = vec![0; 64 << 10];
    while let Ok((count, client)) = here.recv_from(&mut buffer).await {
        if *cut.borrow() {
            continue;
        }
        let there = match clients.get(&client) {
            Some(there) => there.clone(),
            None => {
                let there = Arc::new(UdpSocket::bind((target.ip(), 0)).await.unwrap());
                there.connect(target).await.unwrap();
                clients.insert(client, there.clone());
                let (here, from, cut) = (here.clone(), there.clone(), cut.clone());
                tokio::spawn(async move {
                    let mut buffer = vec![0; 64 << 10];
                    loop {
                        match from.recv(&mut buffer).await {
                            Ok(count) if !*cut.borrow() => drop(here.send_to(&buffer[..count], client).await),
                            Ok(_) => {}
                            Err(_) => return,
                        }
                    }
                });
                there
            }
        };
        let _ = there.send(&buffer[..count]).await;
    }
}
