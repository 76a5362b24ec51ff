# Installs virtd and builds its Debian package. `./check` is for developers; see README.md.
#
#   make                      build (release)
#   make install              DESTDIR=, PREFIX=/usr, SYSCONFDIR=/etc
#   make deb                  target/debian/virtd_<version>_<arch>.deb

PREFIX = /usr
SBINDIR = $(PREFIX)/sbin
DATADIR = $(PREFIX)/share
INCLUDEDIR = $(PREFIX)/include
LIBDIR = $(PREFIX)/lib
DOCDIR = $(DATADIR)/doc/virtd
CARGO = cargo
# dev or release; dev is what ./check tests with
PROFILE = release
BINARY = target/$(subst dev,debug,$(PROFILE))/virtd
PUT = install -D -m 644

build:
	$(CARGO) build --locked --profile $(PROFILE) --bin virtd

install: build
	install -D -m 755 $(BINARY) $(DESTDIR)$(SBINDIR)/virtd
	for file in data/interfaces/*.xml; do $(PUT) $$file $(DESTDIR)$(DATADIR)/dbus-1/interfaces/$${file##*/} || exit 1; done
	$(PUT) data/virt-qtypes.h $(DESTDIR)$(INCLUDEDIR)/virt-qtypes.h
	$(PUT) dbus-policy/org.virt.conf $(DESTDIR)$(DATADIR)/dbus-1/system.d/org.virt.conf
	$(PUT) data/dbus/org.virt.system.service $(DESTDIR)$(DATADIR)/dbus-1/system-services/org.virt.service
	$(PUT) data/dbus/org.virt.session.service $(DESTDIR)$(DATADIR)/dbus-1/services/org.virt.service
	$(PUT) data/systemd/virtd.service $(DESTDIR)$(LIBDIR)/systemd/system/virtd.service
	$(PUT) data/systemd/virtd-user.service $(DESTDIR)$(LIBDIR)/systemd/user/virtd.service
	sed -i 's|/usr/sbin/virtd|$(SBINDIR)/virtd|' \
	    $(DESTDIR)$(DATADIR)/dbus-1/system-services/org.virt.service \
	    $(DESTDIR)$(DATADIR)/dbus-1/services/org.virt.service \
	    $(DESTDIR)$(LIBDIR)/systemd/system/virtd.service \
	    $(DESTDIR)$(LIBDIR)/systemd/user/virtd.service
	$(PUT) data/networks/default.xml $(DESTDIR)$(DATADIR)/virtd/networks/default.xml
	$(PUT) data/firewalld/zones/virt.xml $(DESTDIR)$(LIBDIR)/firewalld/zones/virt.xml
	$(PUT) data/firewalld/policies/virt-in.xml $(DESTDIR)$(LIBDIR)/firewalld/policies/virt-in.xml
	$(PUT) data/pools/default.xml $(DESTDIR)$(DATADIR)/virtd/pools/default.xml
	$(PUT) data/sysusers.conf $(DESTDIR)$(LIBDIR)/sysusers.d/virtd.conf
	$(PUT) data/tmpfiles.conf $(DESTDIR)$(LIBDIR)/tmpfiles.d/virtd.conf
	$(PUT) polkit/org.virt.policy $(DESTDIR)$(DATADIR)/polkit-1/actions/org.virt.policy
	$(PUT) data/org.virt.5 $(DESTDIR)$(DATADIR)/man/man5/org.virt.5
	$(PUT) data/virtd.8 $(DESTDIR)$(DATADIR)/man/man8/virtd.8
	$(PUT) README.md $(DESTDIR)$(DOCDIR)/README.md
	$(PUT) docs/ARCHITECTURE.md $(DESTDIR)$(DOCDIR)/ARCHITECTURE.md
	$(PUT) docs/DOMAIN-XML.md $(DESTDIR)$(DOCDIR)/DOMAIN-XML.md
	$(PUT) docs/NETWORK-XML.md $(DESTDIR)$(DOCDIR)/NETWORK-XML.md
	$(PUT) docs/NODE-DEVICE-XML.md $(DESTDIR)$(DOCDIR)/NODE-DEVICE-XML.md
	$(PUT) docs/SAVED-STATE.md $(DESTDIR)$(DOCDIR)/SAVED-STATE.md
	$(PUT) docs/SECRET-XML.md $(DESTDIR)$(DOCDIR)/SECRET-XML.md
	$(PUT) docs/SECURITY.md $(DESTDIR)$(DOCDIR)/SECURITY.md
	$(PUT) docs/STORAGE-XML.md $(DESTDIR)$(DOCDIR)/STORAGE-XML.md
	$(PUT) dbus-policy/org.virt-private.conf $(DESTDIR)$(DOCDIR)/examples/org.virt-private.conf
	$(PUT) polkit/50-org.virt.example.rules $(DESTDIR)$(DOCDIR)/examples/50-org.virt.rules
	$(PUT) data/virtd.toml $(DESTDIR)$(DOCDIR)/examples/virtd.toml

deb: build
	data/debian/make-deb $(BINARY) $(PROFILE)

.PHONY: build install deb
