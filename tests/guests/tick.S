# A guest of 512 bytes: prints `C<counter> B<boots>` in hexadecimal on COM1 every 0.22 s and writes both to sector 1 of its
# disk, where boots is read from at the start. The ACPI power button makes it print P and power off. E after a line means
# that the write failed. See make-tick.
.code16
.globl _start
_start: ljmp $0,$1f
1:  xor %ax,%ax; mov %ax,%ds; mov %ax,%es; mov %ax,%ss; mov $0x7c00,%sp; sti; mov %dl,drive
    mov $0x3f9,%dx; xor %al,%al; out %al,%dx; mov $0x3fb,%dx; mov $0x80,%al; out %al,%dx
    mov $0x3f8,%dx; mov $1,%al; out %al,%dx; inc %dx; xor %al,%al; out %al,%dx
    mov $0x3fb,%dx; mov $3,%al; out %al,%dx
    mov $0x602,%dx; mov $0x100,%ax; out %ax,%dx   # enable the ACPI power button
    mov $0x42,%ah; call disk; mov 0x8004,%eax; mov %eax,boots; incl boots
loop: incl counter; mov $'C',%al; call putc; mov counter,%eax; call hex
    mov $'B',%al; call putc; mov boots,%eax; call hex; mov $'\n',%al; call putc
    mov counter,%eax; mov %eax,0x8000; mov boots,%eax; mov %eax,0x8004; mov $0x43,%ah; call disk
    jnc 2f; mov $'E',%al; call putc               # E = disk write failed
2:  mov $4,%cx
3:  hlt; mov $0x600,%dx; in %dx,%ax; test $1,%ah; jnz off
    mov 0x46c,%eax; cmp last,%eax; je 3b; mov %eax,last; loop 3b; jmp loop
off: mov $'P',%al; call putc; mov $0x604,%dx; mov $0x2000,%ax; out %ax,%dx; jmp off
disk: mov $dap,%si; mov drive,%dl; xor %al,%al; int $0x13; ret
hex: mov $8,%cx
4:  rol $4,%eax; push %eax; and $15,%al; add $'0',%al; cmp $'9',%al; jbe 5f; add $39,%al
5:  call putc; pop %eax; loop 4b; mov $' ',%al
putc: push %dx; push %ax; mov $0x3fd,%dx
6:  in %dx,%al; test $0x20,%al; jz 6b; pop %ax; mov $0x3f8,%dx; out %al,%dx; pop %dx; ret
.align 4
dap: .byte 16,0; .word 1; .word 0x8000,0; .quad 1
drive: .byte 0
.align 4
last: .long 0
counter: .long 0
boots: .long 0
.org 510
.word 0xaa55
